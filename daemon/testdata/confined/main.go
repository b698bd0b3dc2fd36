// Confined confines itself as its arguments say, tries what it should not be able to do any more, and prints for each
// attempt, on each of several threads, whether it failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/droverproject/drover/daemon"
)

func main() {
	sandbox := flag.Bool("sandbox", false, "")
	user := flag.String("user", "", "")
	dir := flag.String("dir", "", "has the files open and closed, and the folder own with a file gone")
	addr := flag.String("addr", "", "of a TCP listener")
	flag.Parse()
	if err := run(*sandbox, *user, *dir, *addr); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(sandbox bool, user, dir, addr string) error {
	file, err := os.OpenFile(filepath.Join(dir, "open"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c := daemon.Confinement{Sandbox: sandbox, Removable: []string{filepath.Join(dir, "own")}}
	if user != "" {
		if c.User, err = daemon.ParseUser(user); err != nil {
			return err
		}
	}
	// Threads that were there before are confined as well.
	const threads = 3
	var ready, all sync.WaitGroup
	confined := make(chan struct{})
	results := make([]string, threads)
	ready.Add(threads)
	for i := range threads {
		all.Add(1)
		go func() {
			defer all.Done()
			runtime.LockOSThread()
			ready.Done()
			<-confined
			results[i] = attempts(dir, addr)
		}()
	}
	ready.Wait()
	notes, err := daemon.Confine(c)
	if err != nil {
		return err
	}
	close(confined)
	all.Wait()
	for _, r := range results[1:] {
		if r != results[0] {
			return fmt.Errorf("threads differ:\n%s\n%s", results[0], r)
		}
	}
	fmt.Print(results[0])
	fmt.Println("notes:", len(notes))
	// What is open goes on working.
	if _, err := file.WriteAt([]byte("new"), 0); err != nil {
		return err
	}
	if err := file.Truncate(2); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	fmt.Println("remove own:", verdict(os.Remove(filepath.Join(dir, "own", "gone"))))
	return nil
}

func attempts(dir, addr string) string {
	var b strings.Builder
	try := func(what string, err error) { fmt.Fprintf(&b, "%s: %s\n", what, verdict(err)) }
	f, err := os.Open(filepath.Join(dir, "closed"))
	if err == nil {
		f.Close()
	}
	try("read", err)
	_, err = os.ReadDir(dir)
	try("list", err)
	_, err = os.MkdirTemp(dir, "new")
	try("make", err)
	try("truncate", os.Truncate(filepath.Join(dir, "closed"), 1))
	nc, err := net.Dial("tcp", addr)
	if err == nil {
		nc.Close()
	}
	try("connect", err)
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // Go listens with MPTCP where it can, which the kernel does not count as TCP here
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err == nil {
		l.Close()
	}
	try("listen", err)
	try("chown", os.Lchown(filepath.Join(dir, "closed"), 1, 1))
	try("root", syscall.Setresuid(-1, 0, -1))
	return b.String()
}

func verdict(err error) string {
	switch {
	case err == nil:
		return "done"
	case errors.Is(err, fs.ErrPermission):
		return "denied"
	}
	return err.Error()
}

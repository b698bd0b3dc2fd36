package daemon

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// activated is the environment that a service manager gives to this process.
func activated(fds string) func(string) string {
	return func(key string) string {
		return map[string]string{"LISTEN_PID": strconv.Itoa(os.Getpid()), "LISTEN_FDS": fds}[key]
	}
}

// TestActivation passes two sockets to a child, as a service manager does.
func TestActivation(t *testing.T) {
	if os.Getenv("DROVER_TEST_ACTIVATED") != "" {
		list, err := Activated(activated("2"))
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range list {
			fmt.Println("listener", l.Addr())
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
		return
	}
	sock := filepath.Join(t.TempDir(), "sock")
	cmd := exec.Command(os.Args[0], "-test.run=^TestActivation$")
	cmd.Env = append(os.Environ(), "DROVER_TEST_ACTIVATED=1")
	want := ""
	for _, network := range []string{"unix", "tcp"} {
		addr := sock
		if network == "tcp" {
			addr = "127.0.0.1:0"
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		want += fmt.Sprintln("listener", l.Addr())
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := string(out); len(got) < len(want) || got[:len(want)] != want {
		t.Errorf("the child found\n%swant\n%s", got, want)
	}
	if _, err := os.Lstat(sock); err != nil {
		t.Errorf("the child has removed the service manager's socket: %v", err)
	}
}

func TestNoActivation(t *testing.T) {
	for name, getenv := range map[string]func(string) string{
		"none":        func(string) string { return "" },
		"for another": func(key string) string { return map[string]string{"LISTEN_PID": "1", "LISTEN_FDS": "1"}[key] },
	} {
		if list, err := Activated(getenv); err != nil || len(list) != 0 {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
	for _, fds := range []string{"", "x", "-1", "100000"} {
		if _, err := Activated(activated(fds)); err == nil {
			t.Errorf("LISTEN_FDS=%q is accepted", fds)
		}
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	getenv := func(string) string { return path }
	if err := Notify(getenv, "READY=1"); err == nil {
		t.Error("no error though nobody listens")
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := Notify(getenv, "READY=1"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	if err := Notify(func(string) string { return "" }, "READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
}

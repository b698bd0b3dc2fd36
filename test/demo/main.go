// Command demo takes one real file system through drover and has stock tools judge the outcome: it is created, served,
// filled, written, stopped, checked and compared. It needs no root and leaves nothing behind.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/droverproject/drover/test/peer"
)

const startLimit = 20 * time.Second

func main() {
	drover := flag.String("drover", "bin/drover", "the drover to show")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *drover); err != nil {
		stop()
		fmt.Fprintf(os.Stderr, "\nThe demo failed: %v\n", err)
		os.Exit(1)
	}
}

// demo is the state that the steps share.
type demo struct {
	ctx    context.Context
	drover string
	dir    string
	began  time.Time
	server *exec.Cmd
	ended  chan error // receives how the server ended
	said   bytes.Buffer
}

func run(ctx context.Context, drover string) (err error) {
	for _, name := range []string{"mke2fs", "nbdcopy", "qemu-io", "qemu-img"} {
		if _, err := peer.Look(name); err != nil {
			return err
		}
	}
	d := &demo{ctx: ctx, began: time.Now(), ended: make(chan error, 1)}
	if d.drover, err = filepath.Abs(drover); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "drover-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.dir)
	defer d.kill()
	if err := d.steps(); err != nil {
		return err
	}
	fmt.Printf("\nAll steps succeeded in %.1f s.\n", time.Since(d.began).Seconds())
	return nil
}

// The numbers of the write step. The raw copy gets the same bytes, so that the two can be compared at the end.
const (
	patternByte = 0x5a
	patternOff  = 1_234_567
	patternLen  = 345_678
	zeroOff     = 2_000_000
	zeroLen     = 300_000
)

func (d *demo) steps() error {
	raw, image, socket := filepath.Join(d.dir, "fs.raw"), filepath.Join(d.dir, "fs.qcow2"), filepath.Join(d.dir, "nbd")
	uri := "nbd+unix:///?socket=" + socket
	goroot, err := d.output("go", "env", "GOROOT")
	if err != nil {
		return err
	}
	source := filepath.Join(strings.TrimSpace(goroot), "src")
	const size = "512M"
	steps := []struct {
		what string
		do   func() (string, error)
	}{
		{"make an ext4 file system of the Go sources (" + source + ")", func() (string, error) {
			_, err := d.output("mke2fs", "-q", "-t", "ext4", "-d", source, raw, size)
			return "", err
		}},
		{"create an empty QCOW2 image with drover create", func() (string, error) {
			return d.output(d.drover, "create", "-f", "qcow2", image, size)
		}},
		{"serve it with drover serve on a unix socket", func() (string, error) { return "", d.serve(image, socket) }},
		{"copy the file system in with nbdcopy, 4 connections", func() (string, error) {
			_, err := d.output("nbdcopy", "--connections=4", "--flush", raw, uri)
			return "", err
		}},
		{"write, zero and read odd ranges with qemu-io over NBD", func() (string, error) { return "", d.qemuIO(uri) }},
		{"copy it back out with nbdcopy and compare with the source", func() (string, error) {
			out := filepath.Join(d.dir, "out.raw")
			if _, err := d.output("nbdcopy", "--connections=4", uri, out); err != nil {
				return "", err
			}
			if err := overwrite(raw); err != nil {
				return "", err
			}
			return "", sameFiles(raw, out)
		}},
		{"stop the server with SIGTERM", func() (string, error) { return "", d.stop() }},
		{"check the image with drover check", func() (string, error) {
			return d.output(d.drover, "check", "-f", "qcow2", image)
		}},
		{"check the image with qemu-img check", func() (string, error) {
			return d.output("qemu-img", "check", "-f", "qcow2", image)
		}},
		{"compare with the raw file by qemu-img compare", func() (string, error) {
			return d.output("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
		}},
		{"describe the image with drover info", func() (string, error) {
			return d.output(d.drover, "info", "-f", "qcow2", image)
		}},
	}
	for i, s := range steps {
		fmt.Printf("%2d. %-62s", i+1, s.what)
		begin := time.Now()
		said, err := s.do()
		if err != nil {
			fmt.Println(" FAILED")
			return err
		}
		fmt.Printf(" %6.2f s\n", time.Since(begin).Seconds())
		for _, line := range strings.Split(strings.TrimSpace(said), "\n") {
			if line != "" {
				fmt.Println("      " + strings.ReplaceAll(line, d.dir+"/", ""))
			}
		}
	}
	return nil
}

func (d *demo) output(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(d.ctx, peer.Path(name), args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// serve starts the server and returns when its socket answers.
func (d *demo) serve(image, socket string) error {
	d.server = exec.Command(d.drover, "serve", "--socket", socket, "--format", "qcow2", image)
	d.server.Stdout, d.server.Stderr = &d.said, &d.said
	if err := d.server.Start(); err != nil {
		d.server = nil
		return err
	}
	go func(cmd *exec.Cmd) { d.ended <- cmd.Wait() }(d.server)
	ctx, cancel := context.WithTimeout(d.ctx, startLimit)
	defer cancel()
	retry := time.NewTicker(2 * time.Millisecond)
	defer retry.Stop()
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		select {
		case err := <-d.ended:
			d.server = nil
			return fmt.Errorf("the server ended before it served: %v\n%s", err, d.said.String())
		case <-ctx.Done():
			return fmt.Errorf("the server did not answer: %w", ctx.Err())
		case <-retry.C:
		}
	}
}

func (d *demo) stop() error {
	if err := d.server.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := <-d.ended
	d.server = nil
	if err != nil {
		return fmt.Errorf("the server ended badly: %w\n%s", err, d.said.String())
	}
	return nil
}

// kill ends a server that a failed step left behind.
func (d *demo) kill() {
	if d.server == nil {
		return
	}
	_ = d.server.Process.Kill() // fails only when it has just ended by itself
	<-d.ended
}

func (d *demo) qemuIO(uri string) error {
	said, err := d.output("qemu-io", "-f", "raw",
		"-c", fmt.Sprintf("write -P %d %d %d", patternByte, patternOff, patternLen),
		"-c", fmt.Sprintf("write -z %d %d", zeroOff, zeroLen),
		"-c", "flush",
		"-c", fmt.Sprintf("read -P %d %d %d", patternByte, patternOff, patternLen),
		"-c", fmt.Sprintf("read -P 0 %d %d", zeroOff, zeroLen), uri)
	if err == nil && strings.Contains(said, "verification failed") {
		err = errors.New(said)
	}
	return err
}

// overwrite makes the changes of qemuIO to the raw file.
func overwrite(raw string) error {
	f, err := os.OpenFile(raw, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{patternByte}, patternLen), patternOff)
	if err == nil {
		_, err = f.WriteAt(make([]byte, zeroLen), zeroOff)
	}
	return errors.Join(err, f.Close())
}

func sameFiles(a, b string) error {
	x, err := os.ReadFile(a)
	if err != nil {
		return err
	}
	y, err := os.ReadFile(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(x, y) {
		return fmt.Errorf("%s and %s differ", filepath.Base(a), filepath.Base(b))
	}
	return nil
}

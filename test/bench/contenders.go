package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// contender is one NBD server. All serve buffered (through the page cache), writeback, to many clients. One without args is
// no server: the load works on the raw file itself, which is the limit of what any server can do.
type contender struct {
	name   string
	format string // of its image
	args   func(image, socket string) []string
}

func (c contender) image(dir string) string { return filepath.Join(dir, c.name+"."+c.format) }

func allContenders(drover string) []contender {
	qemu := func(aio string) func(image, socket string) []string {
		return func(image, socket string) []string {
			return []string{"qemu-nbd", "-f", "qcow2", "--cache=writeback", "--aio=" + aio, "-e", "8", "-t", "-k", socket, image}
		}
	}
	return []contender{
		{"drover", "qcow2", func(image, socket string) []string {
			return []string{drover, "serve", "--socket", socket, "--format", "qcow2", image}
		}},
		{"qemu-nbd-uring", "qcow2", qemu("io_uring")},
		{"qemu-nbd-threads", "qcow2", qemu("threads")},
		{"qemu-storage-daemon", "qcow2", func(image, socket string) []string {
			return []string{"qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=" + socket + ",max-connections=0",
				"--blockdev", "driver=qcow2,node-name=n,discard=unmap,file.driver=file,file.aio=io_uring,file.filename=" + image,
				"--export", "type=nbd,id=e,node-name=n,name=,writable=on"}
		}},
		{"file", "raw", nil},
		{"nbdkit-raw", "raw", func(image, socket string) []string {
			return []string{"nbdkit", "-f", "-U", socket, "file", image}
		}},
	}
}

func knownNames() string {
	var names []string
	for _, c := range allContenders("") {
		names = append(names, c.name)
	}
	return strings.Join(names, ", ")
}

func selectContenders(list, drover string) ([]contender, error) {
	var selected []contender
	for _, name := range strings.Split(list, ",") {
		found := false
		for _, c := range allContenders(drover) {
			if c.name == name {
				selected, found = append(selected, c), true
			}
		}
		if !found {
			return nil, fmt.Errorf("no contender is called %q (known: %s)", name, knownNames())
		}
	}
	return selected, nil
}

// server is a running contender.
type server struct {
	cmd    *exec.Cmd
	socket string
	output bytes.Buffer
	ended  chan error
}

const (
	startLimit = 20 * time.Second
	stopLimit  = 30 * time.Second
)

func start(ctx context.Context, cfg config, c contender) (*server, error) {
	socket := filepath.Join(cfg.dir, "socket")
	return launch(ctx, socket, c.args(c.image(cfg.dir), socket))
}

// launch starts a server and waits until it takes connections at its socket.
func launch(ctx context.Context, socket string, args []string) (*server, error) {
	s := &server{socket: socket, ended: make(chan error, 1)}
	if err := os.Remove(s.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	retry := time.NewTicker(2 * time.Millisecond)
	defer retry.Stop()
	for {
		if conn, err := net.Dial("unix", s.socket); err == nil {
			conn.Close()
			return s, nil
		}
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("ended before it served: %v\n%s", err, s.output.String())
		case <-ctx.Done():
			_ = s.cmd.Process.Kill()
			<-s.ended
			return nil, fmt.Errorf("did not answer: %w\n%s", ctx.Err(), s.output.String())
		case <-retry.C:
		}
	}
}

// stop ends the server with SIGTERM. How it exits is not judged here: qemu-nbd and nbdkit have their own ways.
func (s *server) stop() error {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-s.ended:
		return nil
	case <-time.After(stopLimit):
		_ = s.cmd.Process.Kill()
		<-s.ended
		return fmt.Errorf("did not end within %v of SIGTERM", stopLimit)
	}
}

// cpuTime returns the processor time that the server has used, all its threads together.
func (s *server) cpuTime() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The second field is the command's name in parentheses and may hold anything; count from the last one.
	end := bytes.LastIndexByte(data, ')')
	if end < 0 {
		return 0, fmt.Errorf("unexpected content of /proc/PID/stat: %q", data)
	}
	fields := strings.Fields(string(data[end+1:]))
	const utime, stime = 11, 12 // fields 14 and 15 of the line
	if len(fields) <= stime {
		return 0, fmt.Errorf("unexpected content of /proc/PID/stat: %q", data)
	}
	var user, system int64
	if _, err := fmt.Sscan(fields[utime]+" "+fields[stime], &user, &system); err != nil {
		return 0, fmt.Errorf("parsing /proc/PID/stat: %w", err)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every platform that fio and these servers run on
	return time.Duration(user+system) * tick, nil
}

// peakMemory returns the highest resident memory of the server so far, in MiB.
func (s *server) peakMemory() (float64, error) { return s.memory("VmHWM") }

// memory returns one of the kernel's figures about the server's memory, in MiB.
func (s *server) memory(field string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, field+": %f kB", &kib); n == 1 {
			return kib / 1024, nil
		}
	}
	return 0, fmt.Errorf("/proc/PID/status has no %s", field)
}

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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/droverproject/drover/nbd/client"
)

// contender is one NBD server. All serve buffered (through the page cache), writeback, to many clients. One without args is
// no server: the load works on the raw file itself, which is the limit of what any server can do.
type contender struct {
	name   string
	format string // of its image
	args   func(serving) []string
}

// serving is what a server is to serve, and where.
type serving struct {
	image, socket string
	secret        string // the file with the key of an encrypted image, or empty
}

// description is the image as options, in the words that drover and QEMU share.
func (s serving) description() string {
	d := "driver=qcow2,discard=unmap,file.driver=file,file.filename=" + s.image
	if s.secret != "" {
		d += ",encrypt.format=luks,encrypt.key-secret=" + secretID
	}
	return d
}

// object makes the key known.
func (s serving) object() string { return "secret,id=" + secretID + ",file=" + s.secret }

const secretID = "key"

func (c contender) image(dir string) string { return filepath.Join(dir, c.name+"."+c.format) }

// installed reports whether the contender's program is on this machine.
func (c contender) installed() bool {
	program := "fio"
	if c.args != nil {
		program = c.args(serving{})[0]
	}
	_, err := exec.LookPath(program)
	return err == nil
}

func allContenders(drover string) []contender {
	return []contender{
		{"drover", "qcow2", func(s serving) []string { return droverArgs(drover, s) }},
		{"qemu-nbd-uring", "qcow2", func(s serving) []string { return qemuNBDArgs("io_uring", s) }},
		{"qemu-nbd-threads", "qcow2", func(s serving) []string { return qemuNBDArgs("threads", s) }},
		{"qemu-storage-daemon", "qcow2", storageDaemonArgs},
		{"file", "raw", nil},
		{"nbdkit-raw", "raw", func(s serving) []string { return []string{"nbdkit", "-f", "-U", s.socket, "file", s.image} }},
	}
}

func droverArgs(drover string, s serving) []string {
	args := []string{drover, "serve", "--socket", s.socket}
	if s.secret == "" {
		return append(args, "--format", "qcow2", s.image)
	}
	return append(args, "--object", s.object(), "--image-opts", s.description())
}

func qemuNBDArgs(aio string, s serving) []string {
	args := []string{"qemu-nbd", "--cache=writeback", "--aio=" + aio, "-e", "8", "-t", "-k", s.socket}
	if s.secret == "" {
		return append(args, "-f", "qcow2", s.image)
	}
	return append(args, "--object", s.object(), "--image-opts", s.description()+",file.aio="+aio)
}

func storageDaemonArgs(s serving) []string {
	args := []string{"qemu-storage-daemon"}
	if s.secret != "" {
		args = append(args, "--object", s.object())
	}
	return append(args, "--nbd-server", "addr.type=unix,addr.path="+s.socket+",max-connections=0",
		"--blockdev", s.description()+",node-name=n,file.aio=io_uring", "--export", "type=nbd,id=e,node-name=n,name=,writable=on")
}

func knownNames() string {
	var names []string
	for _, c := range allContenders("") {
		names = append(names, c.name)
	}
	return strings.Join(names, ", ")
}

// selectContenders returns those that list names. Where anyMissing is set, those that are not installed are left out, and the
// names of these returned; the first and the last must be there, since all is compared with them.
func selectContenders(list, drover string, anyMissing bool) (selected []contender, missing []string, err error) {
	names := strings.Split(list, ",")
	known := allContenders(drover)
	for i, name := range names {
		k := slices.IndexFunc(known, func(c contender) bool { return c.name == name })
		switch {
		case k < 0:
			return nil, nil, fmt.Errorf("no contender is called %q (known: %s)", name, knownNames())
		case anyMissing && i > 0 && i < len(names)-1 && !known[k].installed():
			missing = append(missing, name)
		default:
			selected = append(selected, known[k])
		}
	}
	return selected, missing, nil
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

// start starts a contender on its image.
func start(ctx context.Context, cfg config, c contender, d disk) (*server, error) {
	s := d.serving(cfg, c)
	return launch(ctx, s.socket, c.args(s))
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

// awaitExport waits until the server serves what it has under the empty name.
func (s *server) awaitExport(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for {
		cl, err := client.Open(ctx, client.Options{Dialing: client.Dialing{Address: client.Address{Path: s.socket}}, ReadOnly: true})
		if err == nil {
			return cl.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no export: %w", err)
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
func (s *server) cpuTime() (time.Duration, error) { return processTime(s.cmd.Process.Pid) }

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

// Command bench measures drover tcmu beside tcmu-runner and the kernel's own file backstore: the same fio load on the same image
// (the kernel's on a raw file with the same content), in turns, in one boot of the test machine. Software emulation makes
// every figure small; only ratios within one boot mean anything.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/droverproject/drover/test/vm"
)

const (
	imageSize = 256 << 20
	freshSize = 8 << 30
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var (
		drover     = flag.String("drover", "bin/drover", "the drover to measure, a static binary")
		cache      = flag.String("cache", "out/vm", "where kernel, tools and initial RAM disk are kept")
		contenders = flag.String("contenders", "drover tcmu-runner fileio", "who takes part")
		rounds     = flag.Int("rounds", 3, "rounds")
		length     = flag.Duration("time", 2*time.Second, "length of one run, by the guest's clock")
		count      = flag.Bool("count", false, "measure by a clock that counts instructions, whatever else the host does")
		markdown   = flag.String("markdown", "", "write the report to this file as Markdown")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	abs, err := filepath.Abs(*cache)
	if err != nil {
		return err
	}
	machine, err := vm.Prepare(abs)
	if err != nil {
		return err
	}
	tools, err := vm.PrepareTools(abs)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "drover-bench-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := makeImages(filepath.Join(dir, "disk")); err != nil {
		return err
	}
	params := filepath.Join(dir, "params")
	text := fmt.Sprintf("ROUNDS=%d\nMILLISECONDS=%d\nCONTENDERS='%s'\nSIZE=%d\nFRESH=%d\nCOUNT=%t\n", *rounds, length.Milliseconds(), *contenders,
		imageSize, int64(freshSize), *count)
	if err := os.WriteFile(params, []byte(text), 0o666); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(abs, "bench.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	results, err := machine.Run(ctx, vm.Job{Drover: *drover, Script: vm.BenchScript, Folder: dir, Tools: tools, DiskSize: "8G",
		Memory: 3072, Count: *count, Files: map[string]string{"job/params": params}, Log: io.MultiWriter(log, os.Stderr)})
	for _, r := range results {
		if !r.OK {
			err = errors.Join(err, fmt.Errorf("%s: %s", r.Name, r.Text))
		}
	}
	if err != nil {
		return err
	}
	console, err := os.ReadFile(log.Name())
	if err != nil {
		return err
	}
	samples, err := parseSamples(string(console))
	if err != nil {
		return err
	}
	how := fmt.Sprintf("two processors by software emulation on %d of the host", runtime.NumCPU())
	if *count {
		how = "one processor whose clock counts instructions, a nanosecond each"
	}
	report := fmt.Sprintf("Guest: %s; %s. %d rounds of %v for each case and contender, in turns, in one boot.\n\n",
		how, time.Now().Format(time.DateOnly), *rounds, *length) + table(samples, strings.Fields(*contenders))
	fmt.Print(report)
	if *markdown == "" {
		return nil
	}
	return os.WriteFile(*markdown, []byte(report), 0o666)
}

// makeImages writes a disk full of noise, as a raw file and as an image.
func makeImages(dir string) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	raw := filepath.Join(dir, "a.raw")
	f, err := os.Create(raw)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(f, rand.Reader, imageSize); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, filepath.Join(dir, "a.qcow2")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img convert: %w: %s", err, out)
	}
	return nil
}

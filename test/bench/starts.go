package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/droverproject/drover/test/harness"
)

// startFigures is what was measured of one server's starts on one disk.
type startFigures struct {
	Disk   string    `json:"disk"`
	Server string    `json:"server"`
	Millis []float64 `json:"first_byte_ms"`
	MiB    []float64 `json:"idle_mib"`
}

// measureStarts measures how long servers take from being started to having answered a read, and what memory they take then.
func measureStarts(ctx context.Context, cfg config) (string, any, error) {
	all, _, err := selectContenders("drover,qemu-nbd-uring", cfg.drover, false)
	if err != nil {
		return "", nil, err
	}
	before := machine()
	var figures []startFigures
	for _, im := range []struct{ name, size string }{{"1 GiB", "1G"}, {"1 TiB", "1T"}, {"2 PiB", "2P"}} {
		image := filepath.Join(cfg.dir, "start.qcow2")
		if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", image, im.size); err != nil {
			return "", nil, err
		}
		of := make([]startFigures, len(all))
		for range cfg.rounds {
			for i, c := range all {
				ms, mib, err := startOnce(ctx, cfg, c, image)
				if err != nil {
					return "", nil, fmt.Errorf("%s: %w", c.name, err)
				}
				of[i].Disk, of[i].Server = im.name, c.name
				of[i].Millis, of[i].MiB = append(of[i].Millis, ms), append(of[i].MiB, mib)
			}
		}
		figures = append(figures, of...)
		if err := os.Remove(image); err != nil {
			return "", nil, err
		}
	}
	return startReport(cfg, before, figures), figures, nil
}

func startReport(cfg config, machine string, all []startFigures) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Machine: %s.\n\n%d starts of each, alternating; medians (lowest to highest).\n\n", machine, cfg.rounds)
	fmt.Fprintln(&b, "| empty disk | server | first byte, ms | idle MiB |")
	fmt.Fprintln(&b, "| --- | --- | ---: | ---: |")
	for _, f := range all {
		fmt.Fprintf(&b, "| %s | %s | %s (%s to %s) | %s |\n", f.Disk, f.Server, figure(median(f.Millis)),
			figure(slices.Min(f.Millis)), figure(slices.Max(f.Millis)), figure(median(f.MiB)))
	}
	return b.String()
}

// startOnce returns the milliseconds until a client had its first bytes, and the server's memory after that.
func startOnce(ctx context.Context, cfg config, c contender, image string) (ms, mib float64, err error) {
	began := time.Now()
	socket := filepath.Join(cfg.dir, "socket")
	srv, err := launch(ctx, socket, c.args(serving{image: image, socket: socket}))
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, srv.stop()) }()
	client, err := harness.Dial(socket, "")
	if err != nil {
		return 0, 0, err
	}
	defer client.Drop()
	if err := client.Read(make([]byte, 4096), 0); err != nil {
		return 0, 0, err
	}
	ms = float64(time.Since(began).Microseconds()) / 1000
	mib, err = srv.memory("VmRSS")
	return ms, mib, err
}

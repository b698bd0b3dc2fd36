package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/droverproject/drover/test/harness"
)

// measureStarts prints how long servers take from being started to having answered a read, and what memory they take then.
func measureStarts(ctx context.Context, cfg config, drover string) error {
	images := []struct{ name, size string }{{"1 GiB", "1G"}, {"1 TiB", "1T"}, {"2 PiB", "2P"}}
	all := allContenders(drover)[:2]
	fmt.Printf("Machine: %s.\n\n%d starts of each, alternating; medians.\n\n", machine(), cfg.rounds)
	fmt.Println("| empty disk | server | first byte, ms | idle MiB |")
	fmt.Println("| --- | --- | ---: | ---: |")
	for _, im := range images {
		image := filepath.Join(cfg.dir, "start.qcow2")
		if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", image, im.size); err != nil {
			return err
		}
		millis, memory := make([][]float64, len(all)), make([][]float64, len(all))
		for range cfg.rounds {
			for i, c := range all {
				ms, mib, err := startOnce(ctx, cfg, c, image)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				millis[i], memory[i] = append(millis[i], ms), append(memory[i], mib)
			}
		}
		for i, c := range all {
			fmt.Printf("| %s | %s | %s | %s |\n", im.name, c.name, figure(median(millis[i])), figure(median(memory[i])))
		}
		if err := os.Remove(image); err != nil {
			return err
		}
	}
	return nil
}

// startOnce returns the milliseconds until a client had its first bytes, and the server's memory after that.
func startOnce(ctx context.Context, cfg config, c contender, image string) (ms, mib float64, err error) {
	began := time.Now()
	socket := filepath.Join(cfg.dir, "socket")
	srv, err := launch(ctx, socket, c.args(image, socket))
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

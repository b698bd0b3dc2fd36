package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
)

// workload is one load that fio makes.
type workload struct {
	Name  string
	RW    string // as fio calls it
	Block string
	Depth int
	Conns int
}

func workloads() []workload {
	var all []workload
	for _, rw := range []string{"randread", "randwrite"} {
		for _, conns := range []int{1, 4} {
			for _, depth := range []int{1, 16, 64} {
				all = append(all, workload{fmt.Sprintf("4k-%s-qd%d-x%d", rw, depth, conns), rw, "4k", depth, conns})
			}
		}
	}
	for _, rw := range []string{"read", "write"} {
		for _, conns := range []int{1, 4} {
			all = append(all, workload{fmt.Sprintf("1m-%s-qd8-x%d", rw, conns), rw, "1m", 8, conns})
		}
	}
	return all
}

// sample is what one run measured.
type sample struct {
	Contender      string  `json:"contender"`
	Round          int     `json:"round"`
	Ops            int64   `json:"ops"`
	OpsPerSecond   float64 `json:"ops_per_second"`
	CPUMicrosPerOp float64 `json:"server_cpu_us_per_op"`
}

type result struct {
	Case    string   `json:"case"`
	Samples []sample `json:"samples"`
}

// runOnce starts the contender, loads it, and stops it.
func runOnce(ctx context.Context, cfg config, c contender, w workload) (s sample, err error) {
	if err := warm(c.image(cfg.dir)); err != nil {
		return s, err
	}
	srv, err := start(ctx, cfg, c)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, srv.stop()) }()

	before, err := srv.cpuTime()
	if err != nil {
		return s, err
	}
	ops, seconds, err := load(ctx, cfg, srv.socket, w)
	if err != nil {
		return s, err
	}
	after, err := srv.cpuTime()
	if err != nil {
		return s, err
	}
	if ops == 0 {
		return s, errors.New("fio did no operation")
	}
	return sample{
		Ops:            ops,
		OpsPerSecond:   float64(ops) / seconds,
		CPUMicrosPerOp: float64((after - before).Microseconds()) / float64(ops),
	}, nil
}

// load runs fio and returns how many operations it did in how many seconds.
func load(ctx context.Context, cfg config, socket string, w workload) (ops int64, seconds float64, err error) {
	args := []string{"--name=" + w.Name, "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket, "--thread",
		"--group_reporting", "--output-format=json", "--rw=" + w.RW, "--bs=" + w.Block, fmt.Sprintf("--iodepth=%d", w.Depth),
		fmt.Sprintf("--numjobs=%d", w.Conns), fmt.Sprintf("--size=%dm", cfg.sizeMiB), "--time_based",
		fmt.Sprintf("--runtime=%dms", int(cfg.seconds*1000)), "--norandommap", "--scramble_buffers=0", "--invalidate=0",
		"--randrepeat=0"}
	if w.Conns > 1 && w.Block == "1m" {
		// Sequential streams begin apart from each other and stay inside the disk.
		share := cfg.sizeMiB / w.Conns
		args = append(args, fmt.Sprintf("--size=%dm", share), fmt.Sprintf("--offset_increment=%dm", share))
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return 0, 0, fmt.Errorf("fio: %w\n%s%s", err, stderr.String(), stdout.String())
	}
	return parseFio(stdout.Bytes())
}

func parseFio(out []byte) (ops int64, seconds float64, err error) {
	// fio's nbd engine says hello on standard output, before the report.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	type direction struct {
		TotalIOs int64 `json:"total_ios"`
		Runtime  int64 `json:"runtime"` // milliseconds
	}
	var report struct {
		Jobs []struct {
			Error int       `json:"error"`
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(&report); err != nil {
		return 0, 0, fmt.Errorf("parsing fio's report: %w\n%s", err, out)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return 0, 0, fmt.Errorf("fio's report has an error or not one group:\n%s", out)
	}
	job := report.Jobs[0]
	millis := max(job.Read.Runtime, job.Write.Runtime)
	if millis <= 0 {
		return 0, 0, fmt.Errorf("fio ran for no time:\n%s", out)
	}
	return job.Read.TotalIOs + job.Write.TotalIOs, float64(millis) / 1000, nil
}

// writePattern writes a raw disk without a zero block, so that no server answers from knowing of holes.
func writePattern(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	rng := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size && err == nil; off += int64(len(buf)) {
		_, _ = rng.Read(buf) // never fails, as documented
		_, err = f.WriteAt(buf, off)
	}
	return errors.Join(err, f.Close())
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

// workload is one load that fio makes.
type workload struct {
	Name  string
	RW    string // as fio calls it
	Block string
	Depth int
	Conns int
	Disk  disk
	Align string // of the offsets, where it is not the block's size
	Size  int64  // of the part of the disk that is used, where it is not all of it
	Fsync int    // writes between two flushes; 0 is none
}

func workloads() []workload {
	var all []workload
	for _, rw := range []string{"randread", "randwrite"} {
		for _, conns := range []int{1, 4} {
			for _, depth := range []int{1, 16, 64} {
				all = append(all, workload{Name: fmt.Sprintf("4k-%s-qd%d-x%d", rw, depth, conns), RW: rw, Block: "4k", Depth: depth, Conns: conns})
			}
		}
	}
	for _, rw := range []string{"read", "write"} {
		for _, conns := range []int{1, 4} {
			all = append(all, workload{Name: fmt.Sprintf("1m-%s-qd8-x%d", rw, conns), RW: rw, Block: "1m", Depth: 8, Conns: conns})
		}
	}
	// Every write goes to a cluster that no earlier one has allocated, but for a few that chance repeats.
	alloc := workload{Name: "alloc-4k-randwrite-qd16-x1", RW: "randwrite", Block: "4k", Depth: 16, Conns: 1, Disk: diskFresh, Align: "64k"}
	flushed := alloc
	flushed.Name, flushed.Fsync = "alloc-4k-randwrite-qd16-fsync32-x1", 32
	stream := workload{Name: "alloc-1m-write-qd8-x1", RW: "write", Block: "1m", Depth: 8, Conns: 1, Disk: diskFresh}
	scattered := workload{Name: "scattered-4k-randread-qd1-x1", RW: "randread", Block: "4k", Depth: 1, Conns: 1, Disk: diskScattered, Align: scatterStride}
	deep := scattered
	deep.Name, deep.Depth = "scattered-4k-randread-qd16-x1", 16
	return append(all, alloc, flushed, stream, scattered, deep,
		workload{Name: "zlib-4k-read-qd1-x1", RW: "read", Block: "4k", Depth: 1, Conns: 1, Disk: diskZlib},
		workload{Name: "zlib-1m-read-qd8-x1", RW: "read", Block: "1m", Depth: 8, Conns: 1, Disk: diskZlib})
}

// sample is what one run measured.
type sample struct {
	Contender      string  `json:"contender"`
	Round          int     `json:"round"`
	Ops            int64   `json:"ops"`
	OpsPerSecond   float64 `json:"ops_per_second"`
	CPUMicrosPerOp float64 `json:"server_cpu_us_per_op"`
	MemoryMiB      float64 `json:"server_peak_mib"` // resident memory at its highest
	HostKiBPerOp   float64 `json:"host_kib_per_op"` // by which the image's file grew on the host
}

type result struct {
	Case    string   `json:"case"`
	Samples []sample `json:"samples"`
}

// runOnce starts the contender, loads it, and stops it.
func runOnce(ctx context.Context, cfg config, c contender, w workload) (s sample, err error) {
	if err := w.Disk.beforeRun(ctx, cfg, c); err != nil {
		return s, err
	}
	used, err := allocated(c.image(cfg.dir))
	if err != nil {
		return s, err
	}
	if c.args == nil {
		ran, err := load(ctx, cfg, []string{"--ioengine=io_uring", "--filename=" + c.image(cfg.dir)}, w)
		return ran.sample(ran.cpu), err
	}
	srv, err := start(ctx, cfg, c)
	if err != nil {
		return s, err
	}
	ended := false
	defer func() {
		if !ended {
			err = errors.Join(err, srv.stop())
		}
	}()

	before, err := srv.cpuTime()
	if err != nil {
		return s, err
	}
	ran, err := load(ctx, cfg, overNBD(srv.socket), w)
	if err != nil {
		return s, err
	}
	after, err := srv.cpuTime()
	if err != nil {
		return s, err
	}
	s = ran.sample(after - before)
	if s.MemoryMiB, err = srv.peakMemory(); err != nil {
		return s, err
	}
	ended = true
	if err := srv.stop(); err != nil { // the image is whole after this only
		return s, err
	}
	now, err := allocated(c.image(cfg.dir))
	s.HostKiBPerOp = float64(now-used) / 1024 / float64(s.Ops)
	return s, err
}

func (w workload) size(cfg config) int64 {
	if w.Size > 0 {
		return w.Size
	}
	return w.Disk.size(cfg)
}

// tally is what fio did.
type tally struct {
	ops     int64
	seconds float64
	cpu     time.Duration // that fio itself took
}

func (r tally) sample(cpu time.Duration) sample {
	if r.ops == 0 {
		return sample{}
	}
	return sample{Ops: r.ops, OpsPerSecond: float64(r.ops) / r.seconds, CPUMicrosPerOp: float64(cpu.Microseconds()) / float64(r.ops)}
}

func overNBD(socket string) []string {
	return []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket}
}

// load runs fio on what the flags in where name.
func load(ctx context.Context, cfg config, where []string, w workload) (tally, error) {
	args := []string{"--name=" + w.Name, "--thread",
		"--group_reporting", "--output-format=json", "--rw=" + w.RW, "--bs=" + w.Block, fmt.Sprintf("--iodepth=%d", w.Depth),
		fmt.Sprintf("--numjobs=%d", w.Conns), fmt.Sprintf("--size=%d", w.size(cfg)), "--time_based",
		fmt.Sprintf("--runtime=%dms", int(cfg.seconds*1000)), "--norandommap", "--scramble_buffers=0", "--invalidate=0",
		"--randrepeat=0"}
	args = append(args, where...)
	if w.Conns > 1 && w.Block == "1m" {
		// Sequential streams begin apart from each other and stay inside the disk.
		share := cfg.sizeMiB / w.Conns
		args = append(args, fmt.Sprintf("--size=%dm", share), fmt.Sprintf("--offset_increment=%dm", share))
	}
	if w.Align != "" {
		args = append(args, "--blockalign="+w.Align)
	}
	if w.Fsync > 0 {
		args = append(args, fmt.Sprintf("--fsync=%d", w.Fsync))
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return tally{}, fmt.Errorf("fio: %w\n%s%s", err, stderr.String(), stdout.String())
	}
	return parseFio(stdout.Bytes())
}

func parseFio(out []byte) (tally, error) {
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
			// Per cent of a processor, and how long the job ran, in milliseconds, for each of a group's jobs.
			User    float64 `json:"usr_cpu"`
			System  float64 `json:"sys_cpu"`
			Runtime int64   `json:"job_runtime"`
		} `json:"jobs"`
	}
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(&report); err != nil {
		return tally{}, fmt.Errorf("parsing fio's report: %w\n%s", err, out)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return tally{}, fmt.Errorf("fio's report has an error or not one group:\n%s", out)
	}
	job := report.Jobs[0]
	millis := max(job.Read.Runtime, job.Write.Runtime)
	if millis <= 0 {
		return tally{}, fmt.Errorf("fio ran for no time:\n%s", out)
	}
	r := tally{ops: job.Read.TotalIOs + job.Write.TotalIOs, seconds: float64(millis) / 1000}
	if r.ops == 0 {
		return tally{}, fmt.Errorf("fio did no operation:\n%s", out)
	}
	r.cpu = time.Duration((job.User + job.System) / 100 * float64(job.Runtime) * float64(time.Millisecond))
	return r, nil
}

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
	Ops   int    // after which the load ends; 0: it ends by time
	// entries is who takes part where it is not, or not only, the contenders.
	entries func(cfg config, w workload) (all []entry, base string)
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
	all = append(all, alloc, flushed, stream, scattered, deep,
		workload{Name: "zlib-4k-read-qd1-x1", RW: "read", Block: "4k", Depth: 1, Conns: 1, Disk: diskZlib},
		workload{Name: "zlib-4k-read-qd16-x1", RW: "read", Block: "4k", Depth: 16, Conns: 1, Disk: diskZlib},
		workload{Name: "zlib-1m-read-qd8-x1", RW: "read", Block: "1m", Depth: 8, Conns: 1, Disk: diskZlib, entries: withCodecAlone},
		// Some tens of MiB of a larger disk, so that little is read twice.
		workload{Name: "cold-4k-randread-qd64-x1", RW: "randread", Block: "4k", Depth: 64, Conns: 1, Disk: diskCold, Ops: 12000},
		workload{Name: "empty-1m-read-qd8-x1", RW: "read", Block: "1m", Depth: 8, Conns: 1, Disk: diskEmpty},
		workload{Name: "small-4k-randwrite-qd16-x1", RW: "randwrite", Block: "4k", Depth: 16, Conns: 1, Disk: diskSmall, Size: writtenPart},
		workload{Name: "2p-4k-randwrite-qd16-x1", RW: "randwrite", Block: "4k", Depth: 16, Conns: 1, Disk: diskHuge, Size: writtenPart})
	for _, rw := range []string{"randread", "randwrite"} {
		all = append(all, workload{Name: "luks-4k-" + rw + "-qd16-x1", RW: rw, Block: "4k", Depth: 16, Conns: 1, Disk: diskLUKS})
	}
	for _, rw := range []string{"read", "write"} {
		all = append(all, workload{Name: "luks-1m-" + rw + "-qd8-x1", RW: rw, Block: "1m", Depth: 8, Conns: 1, Disk: diskLUKS})
	}
	return append(all, coresCases()...)
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
	Servers []string `json:"servers"` // in the order of the report
	Base    string   `json:"base"`    // the server that the others are compared with
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
		ran, err := loadFile(ctx, cfg, c.image(cfg.dir), w)
		if err != nil {
			return s, err
		}
		s = ran.sample(ran.cpu)
	} else {
		srv, err := start(ctx, cfg, c, w.Disk)
		if err != nil {
			return s, err
		}
		if s, err = srv.loaded(ctx, cfg, w); err != nil {
			return s, err
		}
	}
	now, err := allocated(c.image(cfg.dir)) // which is whole after the server's end only
	s.HostKiBPerOp = float64(now-used) / 1024 / float64(s.Ops)
	return s, err
}

// loaded puts the load on a server that has just been started, and stops it.
func (s *server) loaded(ctx context.Context, cfg config, w workload) (done sample, err error) {
	defer func() { err = errors.Join(err, s.stop()) }()
	before, err := s.cpuTime()
	if err != nil {
		return done, err
	}
	ran, err := loadServer(ctx, cfg, s.socket, w)
	if err != nil {
		return done, err
	}
	after, err := s.cpuTime()
	if err != nil {
		return done, err
	}
	done = ran.sample(after - before)
	done.MemoryMiB, err = s.peakMemory()
	return done, err
}

// writes reports whether the load changes the disk.
func (w workload) writes() bool { return w.RW == "write" || w.RW == "randwrite" }

func (w workload) size(cfg config) int64 {
	if w.Size > 0 {
		return w.Size
	}
	return w.Disk.size(cfg)
}

// tally is what the load did.
type tally struct {
	ops     int64
	flushes int64
	seconds float64
	cpu     time.Duration // that the load itself took
}

func (r tally) sample(cpu time.Duration) sample {
	if r.ops == 0 {
		return sample{}
	}
	return sample{Ops: r.ops, OpsPerSecond: float64(r.ops) / r.seconds, CPUMicrosPerOp: float64(cpu.Nanoseconds()) / 1000 / float64(r.ops)}
}

// loadServer puts the load on whom answers at a socket.
func loadServer(ctx context.Context, cfg config, socket string, w workload) (tally, error) {
	if w.Fsync > 0 {
		return flushingLoad(ctx, cfg, socket, "", w)
	}
	return load(ctx, cfg, []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket}, w)
}

// loadFile puts the load on a raw file itself.
func loadFile(ctx context.Context, cfg config, name string, w workload) (tally, error) {
	if w.Fsync > 0 {
		return flushingLoad(ctx, cfg, "", name, w)
	}
	return load(ctx, cfg, []string{"--ioengine=io_uring", "--filename=" + name}, w)
}

// load runs fio on what the flags in where name.
func load(ctx context.Context, cfg config, where []string, w workload) (tally, error) {
	args := []string{"--name=" + w.Name, "--thread",
		"--group_reporting", "--output-format=json", "--rw=" + w.RW, "--bs=" + w.Block, fmt.Sprintf("--iodepth=%d", w.Depth),
		fmt.Sprintf("--numjobs=%d", w.Conns), fmt.Sprintf("--size=%d", w.size(cfg)), "--norandommap", "--scramble_buffers=0",
		"--invalidate=0", "--randrepeat=0"}
	if w.Ops > 0 {
		args = append(args, fmt.Sprintf("--number_ios=%d", w.Ops))
	} else {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%dms", int(cfg.seconds*1000)))
	}
	args = append(args, where...)
	if w.Conns > 1 && w.Block == "1m" {
		// Sequential streams begin apart from each other and stay inside the disk.
		share := cfg.sizeMiB / w.Conns
		args = append(args, fmt.Sprintf("--size=%dm", share), fmt.Sprintf("--offset_increment=%dm", share))
	}
	if w.Align != "" {
		args = append(args, "--blockalign="+w.Align)
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

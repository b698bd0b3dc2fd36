package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// countedOps is how many operations are counted of each load.
const countedOps = 2000

// countedLoads are the loads whose system calls are counted. A count needs no rounds: the load is a number of operations.
func countedLoads() []workload {
	read := workload{Name: "4k-randread-qd1-x1", RW: "randread", Block: "4k", Depth: 1, Conns: 1, Disk: diskFull, Ops: countedOps}
	write, deep, large := read, read, read
	write.Name, write.RW = "4k-randwrite-qd1-x1", "randwrite"
	deep.Name, deep.Depth = "4k-randread-qd16-x1", 16
	large.Name, large.RW, large.Block, large.Depth = "1m-read-qd8-x1", "read", "1m", 8
	flushed := workload{Name: "alloc-4k-randwrite-qd16-fsync32-x1", RW: "randwrite", Block: "4k", Depth: 16, Conns: 1,
		Disk: diskFresh, Align: "64k", Fsync: 32, Ops: countedOps}
	return []workload{read, write, deep, large, flushed}
}

// counted is what strace saw of a server under one load.
type counted struct {
	Case    string         `json:"case"`
	Server  string         `json:"server"`
	Ops     int64          `json:"ops"`
	Flushes int64          `json:"client_flushes"`
	Calls   map[string]int `json:"calls"`
}

// countSyscalls counts the system calls that servers make for one operation, and how often they sync for one flush.
func countSyscalls(ctx context.Context, cfg config) (string, any, error) {
	var all []counted
	for _, w := range countedLoads() {
		// With io_uring, syncs are no system calls; with threads, all are.
		for _, name := range []string{"drover", "qemu-nbd-uring", "qemu-nbd-threads"} {
			selected, _, err := selectContenders(name, cfg.drover, false)
			if err != nil {
				return "", nil, err
			}
			n, err := countOne(ctx, cfg, selected[0], w)
			if err != nil {
				return "", nil, fmt.Errorf("%s with %s: %w", w.Name, name, err)
			}
			fmt.Fprintf(os.Stderr, "%-36s %-18s %6.2f system calls/op\n", w.Name, name, n.perOp())
			all = append(all, n)
		}
	}
	return syscallReport(all), all, nil
}

func countOne(ctx context.Context, cfg config, c contender, w workload) (n counted, err error) {
	if err := w.Disk.prepare(ctx, cfg, c); err != nil {
		return n, err
	}
	defer os.Remove(c.image(cfg.dir))
	if err := w.Disk.beforeRun(ctx, cfg, c); err != nil {
		return n, err
	}
	srv, err := start(ctx, cfg, c, w.Disk)
	if err != nil {
		return n, err
	}
	defer func() { err = errors.Join(err, srv.stop()) }()
	tracer, err := trace(ctx, srv.cmd.Process.Pid, filepath.Join(cfg.dir, "strace"))
	if err != nil {
		return n, err
	}
	ran, err := loadServer(ctx, cfg, srv.socket, w)
	calls, traceErr := tracer.end()
	if err := errors.Join(err, traceErr); err != nil {
		return n, err
	}
	return counted{Case: w.Name, Server: c.name, Ops: ran.ops, Flushes: ran.flushes, Calls: calls}, nil
}

// tracer is a strace that counts the system calls of a running process.
type tracer struct {
	cmd    *exec.Cmd
	name   string // of the file that it writes its counts into
	output *watched
}

// watched gathers what a program prints, and tells when there is something.
type watched struct {
	text []byte
	said chan struct{}
}

func (w *watched) Write(p []byte) (int, error) {
	if len(w.text) == 0 && len(p) > 0 {
		close(w.said)
	}
	w.text = append(w.text, p...)
	return len(p), nil
}

// trace returns when strace counts.
func trace(ctx context.Context, pid int, name string) (*tracer, error) {
	t := &tracer{name: name, output: &watched{said: make(chan struct{})}}
	t.cmd = exec.CommandContext(ctx, "strace", "-c", "-f", "-o", name, "-p", strconv.Itoa(pid))
	t.cmd.Stderr = t.output
	if err := t.cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	timer := time.AfterFunc(startLimit, func() { close(ended) })
	defer timer.Stop()
	select {
	case <-t.output.said: // "Process N attached with M threads", or why it cannot
		return t, nil
	case <-ended:
		return nil, errors.Join(errors.New("strace did not begin"), t.cmd.Process.Kill(), t.cmd.Wait())
	}
}

// end stops counting and returns the counts.
func (t *tracer) end() (map[string]int, error) {
	if err := t.cmd.Process.Signal(os.Interrupt); err != nil {
		return nil, err
	}
	// How strace exits is of no interest (it ends by the signal): it has written its counts or it has not.
	_ = t.cmd.Wait()
	data, err := os.ReadFile(t.name)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, t.output.text)
	}
	calls := parseStrace(string(data))
	if len(calls) == 0 {
		return nil, fmt.Errorf("strace counted nothing:\n%s%s", t.output.text, data)
	}
	return calls, nil
}

// parseStrace reads the table of strace -c: share of time, seconds, microseconds per call, calls, errors (or nothing), name.
func parseStrace(table string) map[string]int {
	calls := make(map[string]int)
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 5 || f[len(f)-1] == "total" {
			continue
		}
		if n, err := strconv.Atoi(f[3]); err == nil {
			calls[f[len(f)-1]] = n
		}
	}
	return calls
}

func (n counted) perOp() float64 {
	total := 0
	for _, calls := range n.Calls {
		total += calls
	}
	return float64(total) / float64(n.Ops)
}

func (n counted) syncs() int { return n.Calls["fdatasync"] + n.Calls["fsync"] }

// rareCall is how often a call must come for one operation to be named.
const rareCall = 0.05

// names lists the calls, the most frequent first.
func (n counted) names() string {
	var names []string
	for name, calls := range n.Calls {
		if float64(calls) >= rareCall*float64(n.Ops) {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if n.Calls[a] != n.Calls[b] {
			return n.Calls[b] - n.Calls[a]
		}
		return strings.Compare(a, b)
	})
	for i, name := range names {
		names[i] = fmt.Sprintf("%s %.2f", name, float64(n.Calls[name])/float64(n.Ops))
	}
	return strings.Join(names, ", ")
}

func syscallReport(all []counted) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Machine: %s.\n\nSystem calls of the server by `strace -c -f`, over %d operations. strace slows servers down, by each call: those\n",
		machine(), countedOps)
	fmt.Fprint(&b, "that make fewer find more requests waiting, and batches are a little larger than without it at depths above 1.\n\n")
	fmt.Fprint(&b, "| case | server | system calls/op | of them |\n| --- | --- | ---: | --- |\n")
	for _, n := range all {
		fmt.Fprintf(&b, "| %s | %s | %.2f | %s |\n", n.Case, n.Server, n.perOp(), n.names())
	}
	fmt.Fprint(&b, "\nSyncs of the host's file (fdatasync and fsync) for each flush of the client. Those inside io_uring are no system calls.\n\n")
	fmt.Fprint(&b, "| case | server | client's flushes | syncs | syncs/flush |\n| --- | --- | ---: | ---: | ---: |\n")
	for _, n := range all {
		if n.Flushes == 0 {
			continue
		}
		syncs, each := fmt.Sprint(n.syncs()), fmt.Sprintf("%.2f", float64(n.syncs())/float64(n.Flushes))
		if n.syncs() == 0 {
			syncs, each = "not seen", "–"
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %s | %s |\n", n.Case, n.Server, n.Flushes, syncs, each)
	}
	return b.String()
}

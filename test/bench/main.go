// Command bench measures NBD servers against each other: the same fio load over a unix socket, round by round in turn,
// and for each server operations per second and the processor time that the server spent on one operation.
//
// What makes the figures comparable:
//   - contenders alternate within each round, and ratios are taken between neighbours of one round (paired), so that
//     what else the machine does hits all alike;
//   - every contender has its own copy of the image, made in 4 KiB steps, and anew after writes: page cache that was
//     filled by large writes or by read-ahead makes small overwrites many times dearer on some kernels;
//   - the copy is read once before each run, so that reads come from the page cache;
//   - processor time is the server process's user and system time, from the kernel's accounting (for the plain file, fio's).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

type config struct {
	contenders []contender
	cases      []workload
	rounds     int
	seconds    float64
	sizeMiB    int
	dir        string
	drover     string
	shelf      shelf
}

// flags is the command line.
type flags struct {
	contenders, cases string
	list              bool
	markdown, json    string
	floors            string
	record            bool
	plots             string
	starts, syscalls  bool
	inside            string
}

const (
	defaultContenders = "drover,file,nbdkit-raw,qemu-storage-daemon,qemu-nbd-uring"
	defaultFloors     = "test/bench/floors.json"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parseFlags() (f flags, cfg config) {
	flag.StringVar(&cfg.drover, "drover", "bin/drover", "the drover to measure")
	flag.StringVar(&f.contenders, "contenders", defaultContenders,
		"who takes part; the last one is the base of the ratios: "+knownNames()+". Of the default ones, those that are not installed are left out")
	flag.StringVar(&f.cases, "cases", ".", "regular expression of the cases to run, or of the series with -plots")
	flag.BoolVar(&f.list, "list", false, "list the cases, say how long they take, and exit")
	flag.IntVar(&cfg.rounds, "rounds", 7, "rounds for each case")
	flag.Float64Var(&cfg.seconds, "seconds", 1, "length of one run")
	flag.IntVar(&cfg.sizeMiB, "size", 512, "disk size in MiB")
	flag.StringVar(&cfg.dir, "dir", "", "folder for the images (default: a temporary one)")
	flag.StringVar(&f.markdown, "markdown", "", "write the report to this file as Markdown")
	flag.StringVar(&f.json, "json", "", "write every sample to this file as JSON")
	flag.StringVar(&f.floors, "floors", defaultFloors, "fail where a ratio is worse than this file says, if there is one")
	flag.BoolVar(&f.record, "record-floors", false, "write the ratios reached into that file, with some room for noise")
	flag.StringVar(&f.plots, "plots", "", "measure how cost grows instead, and draw a picture of each series into this folder")
	flag.BoolVar(&f.starts, "starts", false, "measure instead how long a server takes to answer after its start, and what it takes idle")
	flag.BoolVar(&f.syscalls, "syscalls", false, "count instead the system calls of an operation, and the syncs of a flush")
	flag.StringVar(&f.inside, "inside", "", "for the program itself: measure KIND:FILE in this process, without a server, and print what was done")
	flag.Parse()
	return f, cfg
}

func run() error {
	f, cfg := parseFlags()
	if cfg.rounds < 1 || cfg.seconds <= 0 || cfg.sizeMiB < 16 {
		return errors.New("needs at least one round, a positive length and a disk of 16 MiB")
	}
	if f.inside != "" {
		return measureInside(context.Background(), os.Stdout, f.inside, cfg.seconds)
	}
	if f.plots == "" {
		var err error
		if cfg.cases, err = selectCases(f.cases); err != nil {
			return err
		}
	}
	selected, missing, err := selectContenders(f.contenders, cfg.drover, f.contenders == defaultContenders)
	if err != nil {
		return err
	}
	cfg.contenders = selected
	if len(missing) > 0 {
		fmt.Fprintf(os.Stderr, "Not installed, and left out: %s.\n", strings.Join(missing, ", "))
	}
	if f.list {
		for _, w := range cfg.cases {
			fmt.Println(w.Name)
		}
		fmt.Println(cfg.forecast())
		return nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if cfg.dir == "" {
		if cfg.dir, err = os.MkdirTemp("", "drover-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(cfg.dir)
	}
	return f.measure(ctx, cfg)
}

// measure does what the flags ask for, and writes what came of it.
func (f flags) measure(ctx context.Context, cfg config) error {
	var report string
	var samples any
	var err error
	switch {
	case f.plots != "":
		report, samples, err = plotSeries(ctx, cfg, f.cases, f.plots)
	case f.starts:
		report, samples, err = measureStarts(ctx, cfg)
	case f.syscalls:
		report, samples, err = countSyscalls(ctx, cfg)
	default:
		return f.measureCases(ctx, cfg)
	}
	if report == "" {
		return err
	}
	return errors.Join(err, f.write(report, samples))
}

func (f flags) measureCases(ctx context.Context, cfg config) error {
	fmt.Fprintln(os.Stderr, cfg.forecast())
	before := machine()
	cfg.shelf = make(shelf)
	defer cfg.shelf.clear()
	results, failed := measure(ctx, cfg)
	if err := f.write(markdownReport(cfg, results, before), results); err != nil {
		return errors.Join(failed, err)
	}
	here := condition{Processors: runtime.NumCPU(), Peer: version("qemu-nbd"), Base: cfg.contenders[len(cfg.contenders)-1].name}
	if f.record {
		return errors.Join(failed, recordFloors(f.floors, here, results))
	}
	return errors.Join(failed, checkFloors(os.Stderr, f.floors, here, results))
}

// write prints the report, and writes the files that were asked for.
func (f flags) write(report string, samples any) error {
	fmt.Print("\n", report)
	if f.markdown != "" {
		if err := os.WriteFile(f.markdown, []byte(report), 0o644); err != nil {
			return err
		}
	}
	if f.json == "" {
		return nil
	}
	data, err := json.MarshalIndent(samples, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(f.json, append(data, '\n'), 0o644)
}

func selectCases(expr string) ([]workload, error) {
	re, err := regexp.Compile(expr)
	if err != nil {
		return nil, fmt.Errorf("-cases: %w", err)
	}
	var selected []workload
	for _, w := range workloads() {
		if re.MatchString(w.Name) {
			selected = append(selected, w)
		}
	}
	if len(selected) == 0 {
		return nil, fmt.Errorf("-cases: no case matches %q", expr)
	}
	return selected, nil
}

// measure runs all cases. One that fails does not take the others with it: what was measured is returned with the error.
func measure(ctx context.Context, cfg config) ([]result, error) {
	var results []result
	var errs []error
	for _, w := range cfg.cases {
		if ctx.Err() != nil {
			return results, errors.Join(append(errs, ctx.Err())...)
		}
		res, err := measureCase(ctx, cfg, w)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", w.Name, err))
			fmt.Fprintf(os.Stderr, "FAILED: %v\n", errs[len(errs)-1])
			continue
		}
		if res != nil {
			results = append(results, *res)
		}
	}
	return results, errors.Join(errs...)
}

// measureCase runs all rounds of a case. It returns nil where nobody can take part.
func measureCase(ctx context.Context, cfg config, w workload) (*result, error) {
	all, base := w.takePart(cfg)
	if len(all) == 0 {
		return nil, nil
	}
	res := &result{Case: w.Name, Base: base}
	for _, e := range all {
		res.Servers = append(res.Servers, e.name)
		if e.clean != nil {
			defer e.clean()
		}
		if e.prepare == nil {
			continue
		}
		if err := e.prepare(ctx); err != nil {
			return nil, fmt.Errorf("preparing what %s works on: %w", e.name, err)
		}
	}
	for round := range cfg.rounds {
		for i := range all {
			// Who begins changes from round to round.
			e := all[(i+round)%len(all)]
			s, err := e.run(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", e.name, err)
			}
			s.Contender, s.Round = e.name, round
			res.Samples = append(res.Samples, s)
			fmt.Fprintf(os.Stderr, "%-36s round %d  %-19s %9.0f op/s  %8.2f us CPU/op  %6.1f MiB  %7.2f KiB of host disk/op\n", w.Name,
				round+1, e.name, s.OpsPerSecond, s.CPUMicrosPerOp, s.MemoryMiB, s.HostKiBPerOp)
		}
	}
	return res, nil
}

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// machine describes what the figures were measured on, and how busy it was.
func machine() string {
	parts := []string{fmt.Sprintf("%d processors", runtime.NumCPU())}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`model name\s*:\s*(.*)`).FindSubmatch(data); m != nil {
			parts[0] += " (" + string(m[1]) + ")"
		}
	}
	if data, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		parts = append(parts, "Linux "+strings.TrimSpace(string(data)))
	}
	if data, err := os.ReadFile("/proc/loadavg"); err == nil {
		average, _, _ := strings.Cut(string(data), " ")
		parts = append(parts, "load average "+average)
	}
	for _, peer := range []string{"qemu-nbd", "nbdkit", "fio"} {
		if v := version(peer); v != "" {
			parts = append(parts, v)
		}
	}
	return strings.Join(parts, "; ") + "; " + time.Now().UTC().Format("2006-01-02 15:04 MST")
}

// version is the first line of what a program says of its version, or empty.
func version(program string) string {
	out, err := exec.Command(program, "--version").Output()
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}

// Command bench measures NBD servers against each other: the same fio load over a unix socket, round by round in turn,
// and for each server operations per second and the processor time that the server spent on one operation.
//
// What makes the figures comparable:
//   - contenders alternate within each round, and ratios are taken between neighbours of one round (paired), so that
//     what else the machine does hits all alike;
//   - every contender has its own copy of the image, rewritten in 4 KiB steps before each case: page cache that was
//     filled by large writes or by read-ahead makes small overwrites many times dearer on some kernels;
//   - the copy is read once before each run, so that reads come from the page cache;
//   - processor time is the server process's user and system time, from the kernel's accounting.
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
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var (
		drover   = flag.String("drover", "bin/drover", "the drover to measure")
		names    = flag.String("contenders", "drover,nbdkit-raw,qemu-nbd-uring", "who takes part, the last one is the base of the ratios: "+knownNames())
		cases    = flag.String("cases", ".", "regular expression of the cases to run")
		list     = flag.Bool("list", false, "list the cases and exit")
		rounds   = flag.Int("rounds", 5, "rounds for each case")
		seconds  = flag.Float64("seconds", 2, "length of one run")
		size     = flag.Int("size", 512, "disk size in MiB")
		dir      = flag.String("dir", "", "folder for the images (default: a temporary one)")
		markdown = flag.String("markdown", "", "write the report to this file as Markdown")
		jsonFile = flag.String("json", "", "write every sample to this file as JSON")
		floors   = flag.String("floors", "", "fail where a ratio is worse than this file says")
		record   = flag.Bool("record-floors", false, "write that file anew, with some room for noise")
		plots    = flag.String("plots", "", "measure how cost grows instead, and draw a picture of each series into this folder")
		starts   = flag.Bool("starts", false, "measure instead how long a server takes to answer after its start, and what it takes idle")
	)
	flag.Parse()
	expr := *cases
	if *plots != "" {
		expr = "." // it chooses series
	}
	selected, err := selectCases(expr)
	if err != nil {
		return err
	}
	if *list {
		for _, w := range selected {
			fmt.Println(w.Name)
		}
		return nil
	}
	cfg := config{cases: selected, rounds: *rounds, seconds: *seconds, sizeMiB: *size, dir: *dir}
	if cfg.rounds < 1 || cfg.seconds <= 0 || cfg.sizeMiB < 16 {
		return errors.New("needs at least one round, a positive length and a disk of 16 MiB")
	}
	if cfg.contenders, err = selectContenders(*names, *drover); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if cfg.dir == "" {
		if cfg.dir, err = os.MkdirTemp("", "drover-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(cfg.dir)
	}
	switch {
	case *plots != "":
		return plotSeries(ctx, cfg, *drover, *cases, *plots)
	case *starts:
		return measureStarts(ctx, cfg, *drover)
	}
	results, err := measure(ctx, cfg)
	if err != nil {
		return err
	}
	report := markdownReport(cfg, results, machine())
	fmt.Print("\n", report)
	if *markdown != "" {
		if err := os.WriteFile(*markdown, []byte(report), 0o644); err != nil {
			return err
		}
	}
	if *jsonFile != "" {
		data, err := json.MarshalIndent(results, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(*jsonFile, append(data, '\n'), 0o644); err != nil {
			return err
		}
	}
	switch {
	case *floors == "":
		return nil
	case *record:
		return recordFloors(*floors, cfg, results)
	}
	return checkFloors(*floors, cfg, results)
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

func measure(ctx context.Context, cfg config) ([]result, error) {
	var results []result
	for _, w := range cfg.cases {
		res := result{Case: w.Name}
		var able []contender
		for _, c := range cfg.contenders {
			if !w.Disk.suits(c) {
				continue
			}
			able = append(able, c)
			if err := w.Disk.prepare(ctx, cfg, c); err != nil {
				return nil, fmt.Errorf("preparing the image of %s: %w", c.name, err)
			}
		}
		for round := range cfg.rounds {
			for i := range able {
				// Who begins changes from round to round.
				c := able[(i+round)%len(able)]
				s, err := runOnce(ctx, cfg, c, w)
				if err != nil {
					return nil, fmt.Errorf("%s with %s: %w", w.Name, c.name, err)
				}
				s.Contender, s.Round = c.name, round
				res.Samples = append(res.Samples, s)
				fmt.Fprintf(os.Stderr, "%-36s round %d  %-18s %9.0f op/s  %8.2f us CPU/op  %6.1f MiB  %7.2f KiB of host disk/op\n", w.Name,
					round+1, c.name, s.OpsPerSecond, s.CPUMicrosPerOp, s.MemoryMiB, s.HostKiBPerOp)
			}
		}
		results = append(results, res)
		for _, c := range able {
			os.Remove(c.image(cfg.dir))
		}
	}
	return results, nil
}

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// machine describes what the figures were measured on.
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
	for _, peer := range []string{"qemu-nbd", "nbdkit", "fio"} {
		if out, err := exec.Command(peer, "--version").Output(); err == nil {
			parts = append(parts, strings.SplitN(string(out), "\n", 2)[0])
		}
	}
	return strings.Join(parts, "; ") + "; " + time.Now().UTC().Format("2006-01-02 15:04 MST")
}

// Command commands measures what works on whole images: drover and qemu-img run the same command on copies of the same
// image, in turn, round by round. It prints the median wall and processor time of each, and the ratio within each round
// as median and range.
//
// The images are copied sparsely and synced before each run, so that both find the same page cache and nothing of the
// copying is still on its way to the disk. A command that makes a file is measured until the file is on the disk: drover's is
// when the command ends, and qemu-img's is synced then.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "commands:", err)
		os.Exit(1)
	}
}

// scenario is one command on one kind of image.
type scenario struct {
	Name string
	// Image names the maker of the image that the command works on.
	Image string
	// Args are the command's arguments; IMAGE stands for the image's name, OUT for one that does not exist, RAW for that of the
	// raw disk of files. Stock, if not nil, are those of qemu-img.
	Args, Stock []string
	// Copies are masters that are copied beside the image, Needs those that must be there; ReadOnly works on the master.
	Copies, Needs []string
	ReadOnly      bool
	// Code is the exit code that both must have.
	Code int
}

func scenarios() []scenario {
	list := []scenario{
		{Name: "snapshot -c, 1M clusters", Image: "big", Args: []string{"snapshot", "-c", "new", "IMAGE"}},
		{Name: "snapshot -a, 1M clusters", Image: "big-snapshot", Args: []string{"snapshot", "-a", "old", "IMAGE"}},
		{Name: "snapshot -d, 1M clusters", Image: "big-snapshot", Args: []string{"snapshot", "-d", "old", "IMAGE"}},
		{Name: "check, 1M clusters", Image: "big", Args: []string{"check", "IMAGE"}},
		{Name: "check, 1M clusters, snapshot", Image: "big-snapshot", Args: []string{"check", "IMAGE"}},
		{Name: "check -r leaks, 1M leaks", Image: "big-leaks", Args: []string{"check", "-q", "-r", "leaks", "IMAGE"}},
		{Name: "check -r all, 1M counts of 0", Image: "big-uncounted", Args: []string{"check", "-q", "-r", "all", "IMAGE"}},
	}
	for _, args := range [][]string{{"info", "IMAGE"}, {"check", "IMAGE"}, {"map", "IMAGE"}, {"measure", "-O", "qcow2", "IMAGE"}} {
		list = append(list, scenario{Name: args[0] + ", 1 GiB, empty", Image: "empty.qcow2", Args: args, ReadOnly: true})
	}
	list = append(list, scenario{Name: "create, 1 GiB", Image: "empty.qcow2", Args: []string{"create", "-q", "-f", "qcow2", "OUT", "1G"}, ReadOnly: true})
	return append(list, fileScenarios()...)
}

type sample struct {
	wall, cpu float64
	rss       float64 // MiB at the most
}

func run() error {
	drover := flag.String("drover", "bin/drover", "the drover to measure")
	only := flag.String("cases", ".", "regular expression of the cases to run")
	rounds := flag.Int("rounds", 7, "rounds for each case")
	keep := flag.String("dir", "", "make the images in this folder, and keep them; those that are there are used again")
	files := flag.Int64("files", 1400, "MiB of real files; with -dir, of those that are made anew")
	out := flag.String("markdown", "", "write the table to this file too")
	flag.Parse()
	fileBytes = *files * mib
	re, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-cases: %w", err)
	}
	tool, err := filepath.Abs(*drover)
	if err != nil {
		return err
	}
	dir := *keep
	if dir == "" {
		if dir, err = os.MkdirTemp("", "drover-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d rounds, alternating. Medians; ratios of drover to qemu-img within one round: median (lowest to highest).\n\n", *rounds)
	fmt.Fprintln(&b, "| command | drover | qemu-img | ratio | drover CPU | qemu-img CPU | CPU ratio | drover memory | qemu-img memory |")
	fmt.Fprintln(&b, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, c := range scenarios() {
		if !re.MatchString(c.Name) {
			continue
		}
		row, err := measure(dir, tool, c, *rounds)
		if err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		fmt.Fprintln(os.Stderr, row)
		fmt.Fprintln(&b, row)
	}
	fmt.Print("\n", b.String())
	if *out != "" {
		return os.WriteFile(*out, []byte(b.String()), 0o644)
	}
	return nil
}

// measure runs a scenario and returns its row of the table.
func measure(dir, drover string, c scenario, rounds int) (string, error) {
	for _, name := range append(append([]string{c.Image}, c.Copies...), c.Needs...) {
		if err := made(filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	tools := []string{drover, "qemu-img"}
	var got [2][]sample
	for round := range rounds {
		for i := range tools {
			k := (i + round) % len(tools) // who begins changes from round to round
			s, err := once(dir, tools[k], k == 1, c)
			if err != nil {
				return "", err
			}
			got[k] = append(got[k], s)
		}
	}
	wall := func(s sample) float64 { return s.wall }
	cpu := func(s sample) float64 { return s.cpu }
	rss := func(s sample) float64 { return s.rss }
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s | %.0f MiB | %.0f MiB |", c.Name, duration(median(got[0], wall)),
		duration(median(got[1], wall)), ratios(got, wall), duration(median(got[0], cpu)), duration(median(got[1], cpu)), ratios(got, cpu),
		median(got[0], rss), median(got[1], rss)), nil
}

// duration writes seconds.
func duration(s float64) string {
	if s < 0.1 {
		return fmt.Sprintf("%.1f ms", 1000*s)
	}
	return fmt.Sprintf("%.2f s", s)
}

// once runs the command on a fresh copy, or on the master that it only reads.
func once(dir, tool string, stock bool, c scenario) (sample, error) {
	work := filepath.Join(dir, "work")
	defer os.RemoveAll(work)
	if err := os.MkdirAll(work, 0o700); err != nil {
		return sample{}, err
	}
	image := filepath.Join(dir, c.Image)
	if !c.ReadOnly {
		for _, name := range append([]string{c.Image}, c.Copies...) {
			copied := filepath.Join(work, name)
			if err := command("cp", "--sparse=always", filepath.Join(dir, name), copied); err != nil {
				return sample{}, err
			}
			if err := command("sync", copied); err != nil {
				return sample{}, err
			}
		}
		image = filepath.Join(work, c.Image)
	}
	args := slices.Clone(c.Args)
	if stock && c.Stock != nil {
		args = slices.Clone(c.Stock)
	}
	names := map[string]string{"IMAGE": image, "OUT": filepath.Join(work, "out"), "RAW": filepath.Join(dir, "files.raw")}
	for i := range args {
		if name, ok := names[args[i]]; ok {
			args[i] = name
		}
	}
	cmd := exec.Command(tool, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	began := time.Now()
	err := cmd.Run()
	syncing := ownCPU()
	if err == nil && slices.Contains(c.Args, "OUT") {
		err = syncFile(names["OUT"])
	}
	wall, synced := time.Since(began), ownCPU()-syncing
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return sample{}, err
	}
	if code := cmd.ProcessState.ExitCode(); code != c.Code {
		return sample{}, fmt.Errorf("%s %s: exit code %d, want %d: %s", tool, strings.Join(args, " "), code, c.Code, said.String())
	}
	s := sample{wall: wall.Seconds(), cpu: (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime() + synced).Seconds()}
	s.rss = peakMemory(cmd.ProcessState)
	return s, nil
}

func syncFile(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func median(s []sample, of func(sample) float64) float64 {
	v := make([]float64, len(s))
	for i := range s {
		v[i] = of(s[i])
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func ratios(got [2][]sample, of func(sample) float64) string {
	v := make([]sample, len(got[0]))
	low, high := 0.0, 0.0
	for i := range v {
		r := of(got[0][i]) / max(of(got[1][i]), 1e-6)
		v[i].wall = r
		if i == 0 || r < low {
			low = r
		}
		high = max(high, r)
	}
	return fmt.Sprintf("%.2f (%.2f to %.2f)", median(v, func(s sample) float64 { return s.wall }), low, high)
}

func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

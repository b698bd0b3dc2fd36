package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// series shows how the cost of an operation grows as something else does.
type series struct {
	name   string
	title  string
	axis   string // what grows
	values []int64
	label  func(v int64) string
	load   workload
	// prepare makes the image at the given name for one value; what it needs beside goes into the folder dir.
	prepare func(ctx context.Context, cfg config, v int64, image, dir string) error
	// anew: every run begins with the image as it was prepared, since the load uses up what is measured.
	anew bool
	// tune adapts the load to a value.
	tune func(w *workload, v int64)
	// args gives the servers' command lines where they are not those of one export; nil elements do not take part.
	args func(drover, image, socket string, v int64) map[string][]string
}

func plain(v int64) string { return fmt.Sprint(v) }

func bytesLabel(v int64) string {
	for _, u := range []string{"B", "KiB", "MiB", "GiB", "TiB"} {
		if v < 1024 {
			return fmt.Sprint(v, " ", u)
		}
		v /= 1024
	}
	return fmt.Sprint(v, " PiB")
}

// touched is how many clusters hold data in the series of sizes.
const touched = 1024

func allSeries() []series {
	random := workload{RW: "randread", Block: "4k", Depth: 16, Conns: 1}
	write := random
	write.RW = "randwrite"
	// Most clusters are written once, and copied for it: they belong to a snapshot. It is the same work for all servers.
	shared := write
	shared.Align, shared.Ops = "64k", 2000
	return []series{
		{
			name: "depth", title: "4 KiB random reads, one connection", axis: "requests in flight",
			values: []int64{1, 2, 4, 8, 16, 32, 64}, label: plain, load: random, prepare: prepareWhole,
			tune: func(w *workload, v int64) { w.Depth = int(v) },
		},
		{
			name: "connections", title: "4 KiB random reads, depth 16 each", axis: "connections",
			values: []int64{1, 2, 4, 8}, label: plain, load: random, prepare: prepareWhole,
			tune: func(w *workload, v int64) { w.Conns = int(v) },
		},
		{
			name: "size", title: "4 KiB random overwrites of 1,024 clusters, one connection, depth 16", axis: "virtual size of the disk",
			values: []int64{1 << 30, 64 << 30, 4 << 40, 256 << 40, 2 << 50}, label: bytesLabel, load: write, prepare: prepareTouched,
			tune: func(w *workload, v int64) { w.Size, w.Align = v, fmt.Sprint(v/touched) },
		},
		{
			name: "snapshots", title: "2,000 random writes of 4 KiB to clusters of a snapshot, depth 16", axis: "internal snapshots",
			values: []int64{1, 10, 100, 1000}, label: plain, load: shared, prepare: prepareSnapshots, anew: true,
		},
		{
			name: "chain", title: "4 KiB random reads of the lowest image, one connection, depth 16", axis: "images in the chain",
			values: []int64{1, 2, 5, 10, 20, 50}, label: plain, load: random, prepare: prepareChain,
		},
		{
			name: "exports", title: "4 KiB random reads of one export, one connection, depth 16", axis: "exports of the server",
			values: []int64{1, 10, 100, 1000}, label: plain, load: random, prepare: prepareExports, args: manyExports,
		},
	}
}

func prepareWhole(ctx context.Context, cfg config, _ int64, image, dir string) error {
	whole := filepath.Join(dir, "whole.qcow2")
	if _, err := os.Stat(whole); err != nil {
		c := contender{name: "whole", format: "qcow2"}
		if err := prepareFull(ctx, config{dir: dir, sizeMiB: cfg.sizeMiB}, c); err != nil {
			return err
		}
	}
	return rewrite4K(whole, image)
}

func prepareTouched(ctx context.Context, _ config, size int64, image, _ string) (err error) {
	if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", image, fmt.Sprint(size)); err != nil {
		return err
	}
	write, done, err := writer(ctx, image, "qcow2")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	data := make([]byte, 4096)
	data[0] = 1
	for i := range int64(touched) {
		if err := write(data, i*(size/touched)); err != nil {
			return err
		}
	}
	return nil
}

func prepareSnapshots(ctx context.Context, cfg config, n int64, image, dir string) error {
	if err := prepareWhole(ctx, cfg, 0, image, dir); err != nil {
		return err
	}
	f, err := storage.OpenFile(image, storage.OpenOptions{})
	if err != nil {
		return err
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	for i := range n {
		if _, err := im.CreateSnapshot(ctx, fmt.Sprint("s", i)); err != nil {
			return errors.Join(err, im.Close())
		}
	}
	return im.Close()
}

func prepareChain(ctx context.Context, cfg config, n int64, image, dir string) error {
	if n == 1 {
		return prepareWhole(ctx, cfg, 0, image, dir)
	}
	below := filepath.Join(filepath.Dir(image), "base.qcow2")
	if err := prepareWhole(ctx, cfg, 0, below, dir); err != nil {
		return err
	}
	for i := int64(2); i <= n; i++ {
		name := filepath.Join(filepath.Dir(image), fmt.Sprintf("layer%d.qcow2", i))
		if i == n {
			name = image
		}
		if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(below), "-F", "qcow2", name); err != nil {
			return err
		}
		below = name
	}
	return nil
}

func prepareExports(ctx context.Context, cfg config, n int64, image, dir string) error {
	if err := prepareWhole(ctx, cfg, 0, image, dir); err != nil {
		return err
	}
	for i := int64(1); i < n; i++ {
		if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", exportImage(image, i), "1G"); err != nil {
			return err
		}
	}
	return nil
}

func exportImage(image string, i int64) string {
	if i == 0 {
		return image
	}
	return fmt.Sprintf("%s.%d", image, i)
}

// manyExports serves n images at once. qemu-nbd serves one, so the peer is QEMU's storage daemon.
func manyExports(drover, image, socket string, n int64) map[string][]string {
	ours := []string{drover, "serve", "--socket", socket, "--format", "qcow2"}
	theirs := []string{"qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=" + socket + ",max-connections=0"}
	// What fio asks for comes last: the storage daemon takes clients before it has opened everything.
	for i := n - 1; i >= 0; i-- {
		name := fmt.Sprint("d", i)
		if i == 0 {
			name = ""
		}
		ours = append(ours, "--export", name+"="+exportImage(image, i))
		theirs = append(theirs,
			"--blockdev", fmt.Sprintf("driver=qcow2,node-name=n%d,file.driver=file,file.aio=io_uring,file.filename=%s", i, exportImage(image, i)),
			"--export", fmt.Sprintf("type=nbd,id=e%d,node-name=n%d,name=%s,writable=on", i, i, name))
	}
	return map[string][]string{"drover": ours, "qemu-storage-daemon": theirs}
}

// seriesFigures is what was measured of one series.
type seriesFigures struct {
	Series string  `json:"series"`
	Values []int64 `json:"values"`
	Lines  []line  `json:"lines"`
}

// plotSeries measures the series whose names match expr and draws a picture of each into a folder.
func plotSeries(ctx context.Context, cfg config, expr, folder string) (string, any, error) {
	re, err := regexp.Compile(expr)
	if err != nil {
		return "", nil, fmt.Errorf("-cases: %w", err)
	}
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return "", nil, err
	}
	var report strings.Builder
	fmt.Fprintf(&report, "Machine: %s.\n\nMedians of %d rounds of %g s, alternating.\n", machine(), cfg.rounds, cfg.seconds)
	var chosen []series
	points := 0
	for _, s := range allSeries() {
		if re.MatchString(s.name) {
			chosen, points = append(chosen, s), points+len(s.values)
		}
	}
	fmt.Fprintf(os.Stderr, "%d series: about %.0f minutes.\n", len(chosen), cfg.forecastPoints(points))
	var all []seriesFigures
	var errs []error
	for _, s := range chosen {
		lines, err := s.measure(ctx, cfg)
		if err != nil { // the other series are measured all the same
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
			continue
		}
		all = append(all, seriesFigures{s.name, s.values, lines})
		s.table(&report, lines)
		picture := s.draw(lines, fmt.Sprintf("medians of %d rounds of %g s; bars from the lowest to the highest", cfg.rounds, cfg.seconds))
		if err := os.WriteFile(filepath.Join(folder, s.name+".svg"), []byte(picture), 0o644); err != nil {
			return "", nil, err
		}
	}
	if len(chosen) == 0 {
		return "", nil, fmt.Errorf("-cases: no series matches %q", expr)
	}
	return report.String(), all, errors.Join(errs...)
}

// table writes the figures behind a picture.
func (s series) table(b *strings.Builder, lines []line) {
	fmt.Fprintf(b, "\n%s:\n\n| %s |", s.title, s.axis)
	for _, l := range lines {
		fmt.Fprintf(b, " %s op/s | CPU µs/op |", l.Server)
	}
	fmt.Fprintf(b, "\n| ---: |%s\n", strings.Repeat(" ---: | ---: |", len(lines)))
	for i, v := range s.values {
		fmt.Fprintf(b, "| %s |", s.label(v))
		for _, l := range lines {
			fmt.Fprintf(b, " %s | %s |", figure(median(l.Ops[i])), figure(median(l.CPU[i])))
		}
		fmt.Fprintln(b)
	}
}

// line is what was measured of one server: for each value, round by round.
type line struct {
	Server string      `json:"server"`
	Ops    [][]float64 `json:"ops_per_second"`
	CPU    [][]float64 `json:"server_cpu_us_per_op"`
}

func (s series) measure(ctx context.Context, cfg config) ([]line, error) {
	var lines []line
	for _, v := range s.values {
		samples, err := s.point(ctx, cfg, v)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", s.axis, s.label(v), err)
		}
		for i, p := range samples {
			if i == len(lines) {
				lines = append(lines, line{Server: p.server})
			}
			lines[i].Ops, lines[i].CPU = append(lines[i].Ops, p.ops), append(lines[i].CPU, p.cpu)
			fmt.Fprintf(os.Stderr, "%-12s %-8s %-20s %9.0f op/s  %8.2f us CPU/op\n", s.name, s.label(v), p.server, median(p.ops), median(p.cpu))
		}
	}
	return lines, nil
}

// point is what was measured of one server with one value, round by round.
type point struct {
	server   string
	ops, cpu []float64
}

// point measures all servers with one value, in turn, each on an image of its own.
func (s series) point(ctx context.Context, cfg config, v int64) ([]point, error) {
	w := s.load
	w.Name = s.name
	if s.tune != nil {
		s.tune(&w, v)
	}
	names := []string{"drover", "qemu-nbd-uring"}
	if s.args != nil {
		names[1] = "qemu-storage-daemon"
	}
	points := make([]point, len(names))
	for i, name := range names {
		points[i].server = name
		dir := filepath.Join(cfg.dir, name)
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o777)); err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		image := filepath.Join(dir, "disk.qcow2")
		if err := s.prepare(ctx, cfg, v, image, cfg.dir); err != nil {
			return nil, err
		}
		if s.anew {
			if err := os.Rename(image, prepared(image)); err != nil {
				return nil, err
			}
		}
	}
	for round := range cfg.rounds {
		for k := range names {
			p := &points[(k+round)%len(points)]
			done, err := s.run(ctx, cfg, p.server, v, w)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.server, err)
			}
			p.ops, p.cpu = append(p.ops, done.OpsPerSecond), append(p.cpu, done.CPUMicrosPerOp)
		}
	}
	return points, nil
}

// prepared is where an image stays as it was prepared.
func prepared(image string) string { return image + ".prepared" }

// run starts a server on what was prepared for it, loads it, and stops it.
func (s series) run(ctx context.Context, cfg config, server string, v int64, w workload) (sample, error) {
	at := serving{image: filepath.Join(cfg.dir, server, "disk.qcow2"), socket: filepath.Join(cfg.dir, "socket")}
	if s.anew {
		if err := rewrite4K(prepared(at.image), at.image); err != nil {
			return sample{}, err
		}
	}
	below, err := filepath.Glob(filepath.Join(cfg.dir, server, "base.qcow2"))
	if err != nil {
		return sample{}, err
	}
	for _, name := range append(below, at.image) {
		if err := warm(name); err != nil {
			return sample{}, err
		}
	}
	var args []string
	if s.args != nil {
		args = s.args(cfg.drover, at.image, at.socket, v)[server]
	} else {
		for _, c := range allContenders(cfg.drover) {
			if c.name == server {
				args = c.args(at)
			}
		}
	}
	srv, err := launch(ctx, at.socket, args)
	if err != nil {
		return sample{}, err
	}
	if err := srv.awaitExport(ctx); err != nil {
		return sample{}, errors.Join(err, srv.stop())
	}
	return srv.loaded(ctx, cfg, w)
}

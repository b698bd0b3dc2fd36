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
	// tune adapts the load to a value.
	tune func(w *workload, v int64)
	// args gives the servers' command lines where they are not those of one export; nil elements do not take part.
	args func(drover, image, dir, socket string, v int64) map[string][]string
}

func plain(v int64) string { return fmt.Sprint(v) }

func bytesLabel(v int64) string {
	for _, u := range []string{"", "K", "M", "G", "T"} {
		if v < 1024 {
			return fmt.Sprint(v, u)
		}
		v /= 1024
	}
	return fmt.Sprint(v, "P")
}

// touched is how many clusters hold data in the series of sizes.
const touched = 1024

func allSeries() []series {
	random := workload{RW: "randread", Block: "4k", Depth: 16, Conns: 1}
	write := random
	write.RW = "randwrite"
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
			name: "size", title: "4 KiB random overwrites of 1,024 clusters, depth 16", axis: "size of the disk",
			values: []int64{1 << 30, 64 << 30, 4 << 40, 256 << 40, 2 << 50}, label: bytesLabel, load: write, prepare: prepareTouched,
			tune: func(w *workload, v int64) { w.Size, w.Align = v, fmt.Sprint(v/touched) },
		},
		{
			name: "snapshots", title: "4 KiB random writes, depth 16", axis: "internal snapshots",
			values: []int64{1, 10, 100, 1000}, label: plain, load: write, prepare: prepareSnapshots,
		},
		{
			name: "chain", title: "4 KiB random reads of the lowest image, depth 16", axis: "images in the chain",
			values: []int64{1, 2, 5, 10, 20, 50}, label: plain, load: random, prepare: prepareChain,
		},
		{
			name: "exports", title: "4 KiB random reads of one export, depth 16", axis: "exports of the server",
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
func manyExports(drover, image, _, socket string, n int64) map[string][]string {
	ours := []string{drover, "serve", "--socket", socket, "--format", "qcow2"}
	theirs := []string{"qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=" + socket + ",max-connections=0"}
	for i := range n {
		name := fmt.Sprint("d", i)
		if i == 0 {
			name = "" // what fio asks for
		}
		ours = append(ours, "--export", name+"="+exportImage(image, i))
		theirs = append(theirs,
			"--blockdev", fmt.Sprintf("driver=qcow2,node-name=n%d,file.driver=file,file.aio=io_uring,file.filename=%s", i, exportImage(image, i)),
			"--export", fmt.Sprintf("type=nbd,id=e%d,node-name=n%d,name=%s,writable=on", i, i, name))
	}
	return map[string][]string{"drover": ours, "qemu-storage-daemon": theirs}
}

// plotSeries measures the series whose names match expr and draws a picture of each into a folder.
func plotSeries(ctx context.Context, cfg config, drover, expr, folder string) error {
	re, err := regexp.Compile(expr)
	if err != nil {
		return fmt.Errorf("-cases: %w", err)
	}
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return err
	}
	for _, s := range allSeries() {
		if !re.MatchString(s.name) {
			continue
		}
		lines, err := s.measure(ctx, cfg, drover)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if err := os.WriteFile(filepath.Join(folder, s.name+".svg"), []byte(s.draw(lines)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// line is what was measured of one server, value by value.
type line struct {
	server   string
	ops, cpu []float64 // medians
}

func (s series) measure(ctx context.Context, cfg config, drover string) ([]line, error) {
	var lines []line
	for _, v := range s.values {
		samples, err := s.point(ctx, cfg, drover, v)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", s.axis, s.label(v), err)
		}
		for i, sm := range samples {
			if i == len(lines) {
				lines = append(lines, line{server: sm.server})
			}
			lines[i].ops = append(lines[i].ops, median(sm.ops))
			lines[i].cpu = append(lines[i].cpu, median(sm.cpu))
			fmt.Fprintf(os.Stderr, "%-12s %-6s %-20s %9.0f op/s  %8.2f us CPU/op\n", s.name, s.label(v), sm.server, median(sm.ops), median(sm.cpu))
		}
	}
	return lines, nil
}

// point measures all servers with one value, in turn, each on an image of its own.
func (s series) point(ctx context.Context, cfg config, drover string, v int64) ([]line, error) {
	w := s.load
	w.Name = s.name
	if s.tune != nil {
		s.tune(&w, v)
	}
	names := []string{"drover", "qemu-nbd-uring"}
	if s.args != nil {
		names[1] = "qemu-storage-daemon"
	}
	lines := make([]line, len(names))
	for i, name := range names {
		lines[i].server = name
		dir := filepath.Join(cfg.dir, name)
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o777)); err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		if err := s.prepare(ctx, cfg, v, filepath.Join(dir, "disk.qcow2"), cfg.dir); err != nil {
			return nil, err
		}
	}
	for round := range cfg.rounds {
		for k := range names {
			l := &lines[(k+round)%len(lines)]
			ops, cpu, err := s.run(ctx, cfg, drover, l.server, v, w)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", l.server, err)
			}
			l.ops, l.cpu = append(l.ops, ops), append(l.cpu, cpu)
		}
	}
	return lines, nil
}

func (s series) run(ctx context.Context, cfg config, drover, server string, v int64, w workload) (ops, cpu float64, err error) {
	image := filepath.Join(cfg.dir, server, "disk.qcow2")
	if err := warm(image); err != nil {
		return 0, 0, err
	}
	socket := filepath.Join(cfg.dir, "socket")
	var args []string
	if s.args != nil {
		args = s.args(drover, image, cfg.dir, socket, v)[server]
	} else {
		for _, c := range allContenders(drover) {
			if c.name == server {
				args = c.args(image, socket)
			}
		}
	}
	srv, err := launch(ctx, socket, args)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, srv.stop()) }()
	before, err := srv.cpuTime()
	if err != nil {
		return 0, 0, err
	}
	ran, err := load(ctx, cfg, overNBD(socket), w)
	if err != nil {
		return 0, 0, err
	}
	after, err := srv.cpuTime()
	sm := ran.sample(after - before)
	return sm.OpsPerSecond, sm.CPUMicrosPerOp, err
}

// draw makes an SVG picture: operations per second on the left, processor time per operation on the right.
func (s series) draw(lines []line) string {
	var b strings.Builder
	const width, height = 860, 330
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="20" y="24" font-size="15" fill="#222">%s, by %s</text>`+"\n", s.title, s.axis)
	left, right := make([][]float64, len(lines)), make([][]float64, len(lines))
	for i, l := range lines {
		left[i], right[i] = l.ops, l.cpu
		x := 20 + 190*i
		fmt.Fprintf(&b, `<rect x="%d" y="36" width="14" height="4" fill="%s"/><text x="%d" y="43" fill="#222">%s</text>`+"\n", x, colour(i), x+20, l.server)
	}
	s.panel(&b, 70, "operations per second", left)
	s.panel(&b, 500, "server CPU per operation, µs", right)
	b.WriteString("</svg>\n")
	return b.String()
}

func colour(i int) string { return []string{"#1f6f54", "#c0562b", "#4361a8"}[i%3] }

// panel draws one diagram with its left edge at x0: values upwards from 0, steps to the right.
func (s series) panel(b *strings.Builder, x0 int, what string, values [][]float64) {
	const top, bottom, wide = 80, 270, 330
	most := 0.0
	for _, v := range values {
		for _, y := range v {
			most = max(most, y)
		}
	}
	unit := niceStep(most)
	most = unit * float64(int(most/unit)+1)
	at := func(i int, y float64) (float64, float64) {
		step := float64(wide) / float64(max(1, len(s.values)-1))
		return float64(x0) + float64(i)*step, bottom - y/most*(bottom-top)
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" fill="#555">%s</text>`+"\n", x0, top-14, what)
	for y := 0.0; y <= most*1.0001; y += unit {
		_, py := at(0, y)
		fmt.Fprintf(b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end" fill="#555">%s</text>`+"\n",
			x0, py, x0+wide, py, x0-6, py+4, shortNumber(y))
	}
	for i, v := range s.values {
		px, _ := at(i, 0)
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%s</text>`+"\n", px, bottom+18, s.label(v))
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle" fill="#555">%s</text>`+"\n", x0+wide/2, bottom+38, s.axis)
	for k, v := range values {
		var points []string
		for i, y := range v {
			px, py := at(i, y)
			points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", px, py, colour(k))
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colour(k))
	}
}

// niceStep returns a round distance of which at most six reach up to most.
func niceStep(most float64) float64 {
	for decade := 1e-3; ; decade *= 10 {
		for _, step := range []float64{decade, 2 * decade, 5 * decade} {
			if step*6 >= most {
				return step
			}
		}
	}
}

func shortNumber(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%gM", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%gk", v/1e3)
	}
	return fmt.Sprintf("%g", v)
}

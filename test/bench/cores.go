package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The cores cases show what a second processor brings: the same load on one processor and on two. A server shares its processors
// with the client, which on a machine of two needs one of them; so the library is also measured by itself, and what the machine
// can give at most is shown by bare reads of a file.

// coresDepth is how many readers the library is given.
const coresDepth = 16

func coresCases() []workload {
	inside := workload{RW: "randread", Block: "4k", Depth: coresDepth, Conns: 1, Disk: diskFull}
	library, pread := inside, inside
	library.Name, library.entries = "cores-library-4k-randread", func(cfg config, w workload) ([]entry, string) {
		return insideCores(cfg, w, "library", contender{name: "cores-library", format: "qcow2"})
	}
	pread.Name, pread.entries = "cores-pread-4k-randread", func(cfg config, w workload) ([]entry, string) {
		return insideCores(cfg, w, "pread", contender{name: "cores-pread", format: "raw"})
	}
	server := workload{Name: "cores-server-4k-randread-qd64-x4", RW: "randread", Block: "4k", Depth: 64, Conns: 4, Disk: diskFull, entries: serverCores}
	return []workload{library, pread, server}
}

// confined is a command line that runs on the first n processors of this machine, or nil where it has fewer.
func confined(n int, args []string) []string {
	all, err := processors()
	if err != nil || len(all) < n {
		return nil
	}
	var list []string
	for _, p := range all[:n] {
		list = append(list, strconv.Itoa(p))
	}
	return append([]string{"taskset", "-c", strings.Join(list, ","), "env", fmt.Sprintf("GOMAXPROCS=%d", n)}, args...)
}

// onProcessors makes an entry of what n processors do, and the same of one, which is the base.
func onProcessors(what string, make func(name string, n int) entry) (all []entry, base string) {
	base = what + "-1cpu"
	if confined(2, nil) == nil {
		return nil, base
	}
	return []entry{make(what+"-2cpu", 2), make(base, 1)}, base
}

// insideCores measures a kind of load within a process of its own. All entries read one file.
func insideCores(cfg config, w workload, kind string, c contender) ([]entry, string) {
	image := c.image(cfg.dir)
	return onProcessors(kind, func(name string, n int) entry {
		e := entry{name: name, run: func(ctx context.Context) (sample, error) {
			if err := warm(image); err != nil {
				return sample{}, err
			}
			self, err := os.Executable()
			if err != nil {
				return sample{}, err
			}
			return runInside(ctx, confined(n, []string{self, "-inside", kind + ":" + image, "-seconds", fmt.Sprint(cfg.seconds)}))
		}}
		if n == 1 {
			e.prepare = func(ctx context.Context) error { return w.Disk.prepare(ctx, cfg, c) }
			e.clean = func() { os.Remove(image) }
		}
		return e
	})
}

// serverCores puts the load on drover when it has one processor, and when it has two.
func serverCores(cfg config, w workload) ([]entry, string) {
	return onProcessors("drover", func(name string, n int) entry {
		c := contender{name: name, format: "qcow2", args: func(s serving) []string { return confined(n, droverArgs(cfg.drover, s)) }}
		return contenderEntry(cfg, c, w)
	})
}

// withCodecAlone adds to the contenders the codec by itself, on all processors: what no server can do more of.
func withCodecAlone(cfg config, w workload) ([]entry, string) {
	all, base := contenderEntries(cfg, w)
	image := filepath.Join(cfg.dir, "codec-alone.qcow2")
	alone := entry{
		name:    "codec alone",
		prepare: func(ctx context.Context) error { return prepareZlib(ctx, cfg, image) },
		run: func(ctx context.Context) (sample, error) {
			self, err := os.Executable()
			if err != nil {
				return sample{}, err
			}
			return runInside(ctx, []string{self, "-inside", "inflate:" + image, "-seconds", fmt.Sprint(cfg.seconds)})
		},
		clean: func() { os.Remove(image) },
	}
	return append(all, alone), base
}

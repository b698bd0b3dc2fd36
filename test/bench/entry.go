package main

import (
	"context"
	"os"
)

// entry is one that takes part in a case: a server under load, or a yardstick beside them.
type entry struct {
	name    string
	prepare func(ctx context.Context) error // once, before the rounds; nil where nothing is to be done
	run     func(ctx context.Context) (sample, error)
	clean   func() // nil where nothing is left behind
}

// takePart returns who takes part in a case, and the name of whom they are compared with.
func (w workload) takePart(cfg config) (all []entry, base string) {
	if w.entries != nil {
		return w.entries(cfg, w)
	}
	return contenderEntries(cfg, w)
}

// contenderEntries are the contenders that can serve the case's disk.
func contenderEntries(cfg config, w workload) (all []entry, base string) {
	for _, c := range cfg.contenders {
		if w.Disk.suits(c) {
			all = append(all, contenderEntry(cfg, c, w))
		}
	}
	return all, cfg.contenders[len(cfg.contenders)-1].name
}

func contenderEntry(cfg config, c contender, w workload) entry {
	return entry{
		name:    c.name,
		prepare: func(ctx context.Context) error { return w.Disk.prepare(ctx, cfg, c) },
		run:     func(ctx context.Context) (sample, error) { return runOnce(ctx, cfg, c, w) },
		clean:   func() { os.Remove(c.image(cfg.dir)) },
	}
}

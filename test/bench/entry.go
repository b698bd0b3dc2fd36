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
	image := c.image(cfg.dir)
	return entry{
		name: c.name,
		prepare: func(ctx context.Context) error {
			if cfg.shelf.has(image, w.Disk) {
				return nil
			}
			cfg.shelf.remove(image)
			if err := w.Disk.prepare(ctx, cfg, c); err != nil {
				return err
			}
			cfg.shelf.add(image, w.Disk)
			return nil
		},
		run: func(ctx context.Context) (sample, error) {
			if w.writes() {
				cfg.shelf.spoil(image)
			}
			return runOnce(ctx, cfg, c, w)
		},
	}
}

// shelf remembers which images were made, and which of them are still as they were prepared, so that cases that only read share
// them. A nil shelf remembers nothing.
type shelf map[string]shelved

type shelved struct {
	disk    disk
	spoiled bool
}

func (s shelf) has(image string, d disk) bool {
	at, ok := s[image]
	return ok && at.disk == d && !at.spoiled
}

func (s shelf) add(image string, d disk) {
	if s != nil {
		s[image] = shelved{disk: d}
	}
}

func (s shelf) spoil(image string) {
	if at, ok := s[image]; ok {
		at.spoiled = true
		s[image] = at
	}
}

func (s shelf) remove(image string) {
	if _, ok := s[image]; ok {
		os.Remove(image)
		delete(s, image)
	}
}

// clear removes all images.
func (s shelf) clear() {
	for image := range s {
		s.remove(image)
	}
}

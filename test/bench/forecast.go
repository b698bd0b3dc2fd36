package main

import (
	"fmt"
	"math"
	"time"
)

// What a run takes beside the load (reading the image, starting and stopping the server and fio), and what it takes to make an
// image, on a small machine.
const (
	aroundRun   = 700 * time.Millisecond
	makingImage = 2 * time.Second
)

// making is what it takes to make one server's image of a kind.
func (d disk) making() time.Duration {
	switch d {
	case diskScattered, diskZlib, diskLUKS:
		return 6 * makingImage
	case diskFresh, diskEmpty:
		return 0
	}
	return makingImage
}

// forecast says what is going to be measured and about how long that takes.
func (cfg config) forecast() string {
	var runs int
	var whole time.Duration
	var before workload
	for i, w := range cfg.cases {
		all, _ := w.takePart(cfg)
		runs += len(all) * cfg.rounds
		if i == 0 || before.Disk != w.Disk || before.writes() || w.entries != nil {
			whole += time.Duration(len(all)) * w.Disk.making()
		}
		before = w
	}
	whole += time.Duration(runs) * (time.Duration(cfg.seconds*float64(time.Second)) + aroundRun)
	return fmt.Sprintf("%d cases in %d rounds: %d runs of %g s, about %.0f minutes with what they need beside.",
		len(cfg.cases), cfg.rounds, runs, cfg.seconds, math.Ceil(whole.Minutes()))
}

// forecastPoints is about how many minutes it takes to measure some points of series, of two servers each.
func (cfg config) forecastPoints(points int) float64 {
	const servers = 2
	run := time.Duration(cfg.seconds*float64(time.Second)) + aroundRun
	return math.Ceil((time.Duration(points*servers) * (time.Duration(cfg.rounds)*run + 2*makingImage)).Minutes())
}

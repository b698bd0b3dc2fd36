package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A picture has two diagrams: operations per second on the left, processor time per operation on the right. It brings its own
// background, and follows a reader who prefers dark ones.
const pictureStyle = `<style>
.back { fill: #ffffff } .title { fill: #1a1a1a; font-size: 15px } .text { fill: #444444 } .grid { stroke: #d8d8d8 }
.s0 { fill: #1f6f54; stroke: #1f6f54 } .s1 { fill: #c0562b; stroke: #c0562b } .line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
.back { fill: #16191d } .title { fill: #f0f0f0 } .text { fill: #b8bec6 } .grid { stroke: #3a4048 }
.s0 { fill: #57c99c; stroke: #57c99c } .s1 { fill: #f0906a; stroke: #f0906a } .line { fill: none }
}
</style>
`

const (
	pictureWidth  = 860
	pictureHeight = 345
	panelTop      = 92
	panelBottom   = 275
	panelWidth    = 340
)

// draw makes an SVG picture of a series.
func (s series) draw(lines []line, note string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		pictureWidth, pictureHeight, pictureWidth, pictureHeight)
	b.WriteString(pictureStyle)
	fmt.Fprintf(&b, `<rect class="back" width="%d" height="%d"/>`+"\n", pictureWidth, pictureHeight)
	fmt.Fprintf(&b, `<text class="title" x="20" y="24">%s, by %s</text>`+"\n", escaped(s.title), escaped(s.axis))
	left, right := make([][][]float64, len(lines)), make([][][]float64, len(lines))
	for i, l := range lines {
		left[i], right[i] = l.Ops, l.CPU
		x := 20 + 190*i
		fmt.Fprintf(&b, `<line class="s%d line" x1="%d" y1="44" x2="%d" y2="44"/>`, i, x, x+24)
		mark(&b, i, float64(x+12), 44)
		fmt.Fprintf(&b, `<text class="text" x="%d" y="48">%s</text>`+"\n", x+32, escaped(l.Server))
	}
	s.panel(&b, 60, "operations per second", left)
	s.panel(&b, 495, "server CPU per operation, µs", right)
	fmt.Fprintf(&b, `<text class="text" x="%d" y="%d" text-anchor="end" font-size="10">%s</text>`+"\n",
		pictureWidth-20, pictureHeight-8, escaped(note))
	b.WriteString("</svg>\n")
	return b.String()
}

func escaped(text string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(text)
}

// mark draws a measured point: the servers are told apart by its shape, too.
func mark(b *strings.Builder, server int, x, y float64) {
	if server == 0 {
		fmt.Fprintf(b, `<circle class="s0" cx="%.1f" cy="%.1f" r="3.5"/>`, x, y)
		return
	}
	fmt.Fprintf(b, `<rect class="s%d" x="%.1f" y="%.1f" width="7" height="7"/>`, server, x-3.5, y-3.5)
}

// panel draws one diagram with its left edge at x0: values upwards from 0, steps to the right.
func (s series) panel(b *strings.Builder, x0 int, what string, values [][][]float64) {
	sc := scaleOf(values)
	if sc.log {
		what += " (logarithmic)"
	}
	// Half a step is left free on both sides, for marks and numbers.
	step := float64(panelWidth) / float64(max(1, len(s.values)))
	at := func(i int, y float64) (float64, float64) {
		return float64(x0) + (float64(i)+0.5)*step, panelBottom - sc.part(y)*(panelBottom-panelTop)
	}
	fmt.Fprintf(b, `<text class="text" x="%d" y="%d" font-weight="bold">%s</text>`+"\n", x0, panelTop-14, escaped(what))
	for _, y := range sc.lines {
		_, py := at(0, y)
		fmt.Fprintf(b, `<line class="grid" x1="%d" y1="%.1f" x2="%d" y2="%.1f"/><text class="text" x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n",
			x0, py, x0+panelWidth, py, x0-6, py+4, shortNumber(y))
	}
	for i, v := range s.values {
		px, _ := at(i, 0)
		fmt.Fprintf(b, `<text class="text" x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", px, panelBottom+18, s.label(v))
	}
	fmt.Fprintf(b, `<text class="text" x="%d" y="%d" text-anchor="middle" font-weight="bold">%s</text>`+"\n",
		x0+panelWidth/2, panelBottom+40, escaped(s.axis))
	for k, v := range values {
		var points []string
		for i, rounds := range v {
			px, py := at(i, median(rounds))
			points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
			_, low := at(i, slices.Min(rounds))
			_, high := at(i, slices.Max(rounds))
			fmt.Fprintf(b, `<line class="s%d" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, k, px, low, px, high)
			mark(b, k, px, py)
		}
		fmt.Fprintf(b, "\n"+`<polyline class="s%d line" points="%s"/>`+"\n", k, strings.Join(points, " "))
	}
}

// scale is how values are placed between the bottom and the top of a diagram.
type scale struct {
	log         bool
	least, most float64
	lines       []float64 // values with a line across
}

// wideRange is how far values must lie apart for a linear scale to hide the small ones.
const wideRange = 30

// scaleOf chooses the scale for values by server, step and round.
func scaleOf(values [][][]float64) scale {
	least, most := math.Inf(1), 0.0
	for _, v := range values {
		for _, rounds := range v {
			least, most = min(least, slices.Min(rounds)), max(most, slices.Max(rounds))
		}
	}
	if least > 0 && most/least > wideRange {
		sc := scale{log: true, least: math.Pow(10, math.Floor(math.Log10(least))), most: math.Pow(10, math.Ceil(math.Log10(most)))}
		for decades := math.Round(math.Log10(sc.most / sc.least)); decades >= 0; decades-- {
			sc.lines = append(sc.lines, sc.most/math.Pow(10, decades))
		}
		return sc
	}
	unit := niceStep(most)
	sc := scale{most: unit * float64(int(most/unit)+1)}
	for i := 0.0; i*unit <= sc.most*1.0001; i++ {
		sc.lines = append(sc.lines, i*unit)
	}
	return sc
}

// part is how far up a value is, from 0 to 1.
func (sc scale) part(y float64) float64 {
	if sc.log {
		return math.Log(y/sc.least) / math.Log(sc.most/sc.least)
	}
	return y / sc.most
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
	v = math.Round(v*1e4) / 1e4 // what adding up has left
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%gM", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%gk", v/1e3)
	}
	return fmt.Sprintf("%g", v)
}

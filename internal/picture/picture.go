// Package picture draws simple pictures (rectangles and lines of text) as SVG or PNG.
package picture

import "image/color"

// Picture is what is drawn, in the order in which it was added.
type Picture struct {
	W, H  int
	rects []rect
	texts []text
}

type rect struct {
	x, y, w, h int
	fill       color.RGBA
}

type text struct {
	x, y  int // of its baseline
	size  int
	align Align
	fill  color.RGBA
	s     string
}

// Align says which end of a text its place is.
type Align uint8

// The ends.
const (
	Left Align = iota
	Right
)

// Sizes of text: the height of a capital letter in pixels, a multiple of that of the font.
const (
	Small = capHeight
	Large = 2 * capHeight
)

// New returns a picture with a background.
func New(w, h int, background color.RGBA) *Picture {
	p := &Picture{W: w, H: h}
	p.Rect(0, 0, w, h, background)
	return p
}

// Rect adds a filled rectangle. One that continues the last to the right becomes part of it.
func (p *Picture) Rect(x, y, w, h int, fill color.RGBA) {
	if w <= 0 || h <= 0 {
		return
	}
	if n := len(p.rects); n > 1 {
		if last := &p.rects[n-1]; last.y == y && last.h == h && last.fill == fill && last.x+last.w == x {
			last.w += w
			return
		}
	}
	p.rects = append(p.rects, rect{x, y, w, h, fill})
}

// Text adds a line of text whose baseline begins, or ends, at a place.
func (p *Picture) Text(x, y, size int, align Align, fill color.RGBA, s string) {
	p.texts = append(p.texts, text{x, y, size, align, fill, s})
}

// TextWidth is how wide a PNG has a text; in an SVG it is about that.
func TextWidth(size int, s string) int {
	n := 0
	for range s {
		n++
	}
	return n * advance * size / capHeight
}

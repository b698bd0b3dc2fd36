package picture

import (
	"bufio"
	"fmt"
	"image/color"
	"io"
	"strings"
)

// SVG writes the picture as SVG.
func (p *Picture) SVG(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" shape-rendering="crispEdges">`+"\n",
		p.W, p.H, p.W, p.H)
	for _, r := range p.rects {
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", r.x, r.y, r.w, r.h, hex(r.fill))
	}
	fmt.Fprintf(b, `<g font-family="DejaVu Sans, Helvetica, Arial, sans-serif">`+"\n")
	for _, t := range p.texts {
		anchor := "start"
		if t.align == Right {
			anchor = "end"
		}
		fmt.Fprintf(b, `<text x="%d" y="%d" font-size="%d" text-anchor="%s" fill="%s">%s</text>`+"\n",
			t.x, t.y, t.size*10/7, anchor, hex(t.fill), escape(t.s))
	}
	fmt.Fprintf(b, "</g>\n</svg>\n")
	return b.Flush()
}

func hex(c color.RGBA) string { return fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B) }

// escape makes text safe for XML: names of files come from anywhere.
func escape(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0xfffe || r == 0xffff || r == 0xfffd {
			return '?'
		}
		return r
	}, strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;").Replace(strings.ToValidUTF8(s, "?")))
}

package picture

import (
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
)

// PNG writes the picture as PNG.
func (p *Picture) PNG(w io.Writer) error {
	img := image.NewRGBA(image.Rect(0, 0, p.W, p.H))
	for _, r := range p.rects {
		fill(img, r.x, r.y, r.w, r.h, r.fill)
	}
	for _, t := range p.texts {
		drawText(img, t)
	}
	enc := png.Encoder{CompressionLevel: png.BestCompression}
	return enc.Encode(w, img)
}

func fill(img *image.RGBA, x, y, w, h int, c color.RGBA) {
	draw.Draw(img, image.Rect(x, y, x+w, y+h), image.NewUniform(c), image.Point{}, draw.Src)
}

func drawText(img *image.RGBA, t text) {
	scale := max(t.size/capHeight, 1)
	x := t.x
	if t.align == Right {
		x -= TextWidth(t.size, t.s) - scale // without the gap after the last letter
	}
	for _, r := range t.s {
		rows := glyph(r)
		for i, bits := range rows {
			y := t.y + (i-capHeight)*scale
			for k := range glyphWidth {
				if bits>>(glyphWidth-1-k)&1 != 0 {
					fill(img, x+k*scale, y, scale, scale, t.fill)
				}
			}
		}
		x += advance * scale
	}
}

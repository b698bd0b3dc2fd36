package picture

import (
	"bytes"
	"encoding/xml"
	"errors"
	"image/color"
	"image/png"
	"io"
	"strings"
	"testing"
)

var (
	white = color.RGBA{255, 255, 255, 255}
	red   = color.RGBA{255, 0, 0, 255}
	black = color.RGBA{0, 0, 0, 255}
)

func sample(s string) *Picture {
	p := New(400, 60, white)
	p.Rect(10, 10, 20, 5, red)
	p.Rect(30, 10, 20, 5, red) // one with the first
	p.Rect(50, 10, 0, 5, black)
	p.Text(10, 50, Large, Left, black, s)
	return p
}

func TestPNG(t *testing.T) {
	var b bytes.Buffer
	if err := sample("H").PNG(&b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		x, y int
		want color.RGBA
	}{{0, 0, white}, {9, 12, white}, {10, 10, red}, {49, 14, red}, {50, 12, white}, {10, 15, white},
		// The H: its posts and its bar, at twice the size.
		{10, 49, black}, {19, 36, black}, {14, 42, black}, {14, 38, white}, {10, 50, white}, {10, 35, white}} {
		if got := color.RGBAModel.Convert(img.At(c.x, c.y)); got != c.want {
			t.Errorf("at %d,%d: %v, want %v", c.x, c.y, got, c.want)
		}
	}
}

// TestSVG: names come from anywhere, and what is made of them is still XML.
func TestSVG(t *testing.T) {
	for _, name := range []string{"disk.qcow2", `<a & "b">`, "\x00\xff\x1b[1m", "жук 磁盘"} {
		var b bytes.Buffer
		if err := sample(name).SVG(&b); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(b.String(), "<rect"); n != 2 {
			t.Errorf("%d rectangles, want the background and one", n)
		}
		dec, text := xml.NewDecoder(&b), ""
		for {
			tok, err := dec.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%q: %v", name, err)
			}
			if c, ok := tok.(xml.CharData); ok {
				text += string(c)
			}
		}
		if name == `<a & "b">` && !strings.Contains(text, name) {
			t.Errorf("%q does not say %q", text, name)
		}
	}
}

// TestFont: every letter of ASCII has a shape of its own.
func TestFont(t *testing.T) {
	seen := map[string]rune{}
	for r := ' '; r < 127; r++ {
		rows := glyph(r)
		if bytes.Equal(rows, missing) || len(rows) > capHeight+2 {
			t.Errorf("%q has no shape", r)
		}
		if other, ok := seen[string(rows)]; ok {
			t.Errorf("%q looks like %q", r, other)
		}
		seen[string(rows)] = r
	}
	if !bytes.Equal(glyph('ж'), missing) {
		t.Error("a letter that the font has not")
	}
}

package cli

import (
	"bytes"
	"image/png"
	"os"
	"strings"
	"testing"
)

func TestMapPicture(t *testing.T) {
	holey(t)
	mustDrover(t, "map", "--picture", "p.svg", "disk")
	svg, err := os.ReadFile("p.svg")
	if err != nil {
		t.Fatal(err)
	}
	// 1 MiB of data was zeroed, 1 MiB and what is zeroed was written after the snapshot.
	for _, want := range []string{"64 MiB", "only in snapshots", "'drover compact' gives them back", ">refcounts<", "snapshots: 1", "zeroes"} {
		if !strings.Contains(string(svg), want) {
			t.Errorf("the picture does not say %q", want)
		}
	}
	for _, name := range []string{"disk", "disk.raw"} {
		mustDrover(t, "map", "--picture", "P.PNG", name)
		b, err := os.ReadFile("P.PNG")
		if err != nil {
			t.Fatal(err)
		}
		if img, err := png.Decode(bytes.NewReader(b)); err != nil || img.Bounds().Dx() < 1000 {
			t.Fatal(err)
		}
	}
	if o := drover(t, "map", "--picture", "p.jpeg", "disk"); o.code != 1 || !strings.Contains(o.stderr, ".png") {
		t.Errorf("%+v", o)
	}
	if o := drover(t, "map", "--picture", "missing/p.png", "disk"); o.code != 1 || !strings.Contains(o.stderr, "Could not create") {
		t.Errorf("%+v", o)
	}
	var out, errs bytes.Buffer
	if code := Main(t.Context(), "qemu-img", []string{"map", "--picture", "p.svg", "disk"}, strings.NewReader(""), &out, &errs); code != 1 {
		t.Errorf("qemu-img has pictures: %s", errs.String())
	}
}

// TestPanel divides a range into squares: every byte is in one of them, once.
func TestPanel(t *testing.T) {
	for _, size := range []int64{1, 4096, 5000, 1 << 20, 1<<30 + 512, 3 << 40} {
		p := newPanel(size, 4096, diskParts)
		p.add(0, size/3, diskData)
		p.add(size/3, size, diskNothing) // the end is cut
		var sum int64
		for _, c := range p.cells {
			for _, n := range c {
				sum += n
			}
		}
		if sum != size || p.rows() > picMaxRows || p.perRow > picFinest || picRowWidth%p.perRow != 0 || len(p.cells) > int(p.perRow)*p.rows() {
			t.Errorf("size %d: %d bytes in %d rows of %d squares of %d", size, sum, p.rows(), p.perRow, p.unit)
		}
	}
}

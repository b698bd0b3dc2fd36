package cli

import (
	"context"
	"errors"
	"fmt"
	"image/color"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/internal/picture"
	"github.com/droverproject/drover/qcow2"
)

// part is something that a disk or a file consists of, as a picture shows it.
type part struct {
	name string
	fill color.RGBA
}

func rgb(v uint32) color.RGBA { return color.RGBA{uint8(v >> 16), uint8(v >> 8), uint8(v), 0xff} }

var (
	ink   = rgb(0x1f2933)
	faint = rgb(0x7b8794)
	paper = rgb(0xffffff)
	blank = rgb(0xe9edf1)
)

// The parts of a disk, the last of which is what is nowhere.
const (
	diskData = iota
	diskCompressed
	diskBacking
	diskReserved
	diskZero
	diskNothing
)

var diskParts = []part{
	{"data", rgb(0x2f6db5)}, {"compressed data", rgb(0x7d4fa3)}, {"from the backing file", rgb(0xd9b44a)},
	{"zeroes, with room kept", rgb(0x9cc3e6)}, {"zeroes", rgb(0x8fcfbd)}, {"not allocated", blank},
}

// The parts of a file.
const (
	fileData = iota
	fileCompressed
	fileReserved
	fileSnapshot
	fileMapping
	fileRefcounts
	fileHeader
	fileBitmaps
	fileLeaked
	fileFree
)

var fileParts = []part{
	{"data", rgb(0x2f6db5)}, {"compressed data", rgb(0x7d4fa3)}, {"kept for zeroes", rgb(0x9cc3e6)},
	{"only in snapshots", rgb(0x5b9a3c)}, {"L2 tables", rgb(0xe07b28)}, {"refcounts", rgb(0xa8641b)},
	{"other metadata", rgb(0x3a3f4a)}, {"bitmaps", rgb(0xc9679a)}, {"leaked", rgb(0xd3202f)}, {"free", blank},
}

var partOfHost = [...]int{
	qcow2.HostFree: fileFree, qcow2.HostLeaked: fileLeaked, qcow2.HostHeader: fileHeader, qcow2.HostRefcounts: fileRefcounts,
	qcow2.HostMapping: fileMapping, qcow2.HostBitmaps: fileBitmaps, qcow2.HostData: fileData, qcow2.HostCompressed: fileCompressed,
	qcow2.HostReserved: fileReserved, qcow2.HostSnapshot: fileSnapshot,
}

// The measures of a picture, in pixels.
const (
	picMargin   = 28
	picLabels   = 112 // left of the rows
	picRowWidth = 1024
	picRow      = 15
	picGap      = 5
	picMaxRows  = 24
	picFinest   = 512 // squares in a row at most
)

// panel is a range of bytes drawn in rows, square by square, each of which shows what it consists of from the bottom up.
type panel struct {
	size   int64
	unit   int64 // bytes of a square
	perRow int64
	parts  []part
	cells  [][]int64 // bytes of each part
	sums   []int64
}

// newPanel makes a panel for size bytes; no square is smaller than least.
func newPanel(size, least int64, parts []part) *panel {
	p := &panel{size: size, unit: least, perRow: picFinest, parts: parts, sums: make([]int64, len(parts))}
	for size/p.unit >= picFinest*picMaxRows {
		p.unit *= 2
	}
	n := (size + p.unit - 1) / p.unit
	if n < picFinest {
		p.perRow = 1 << bits.Len64(uint64(max(n, 2)-1))
	}
	p.cells = make([][]int64, n)
	return p
}

// add notes what a range consists of.
func (p *panel) add(off, n int64, part int) {
	n = min(n, p.size-off)
	for n > 0 {
		i := off / p.unit
		step := min(n, (i+1)*p.unit-off)
		if p.cells[i] == nil {
			p.cells[i] = make([]int64, len(p.parts))
		}
		p.cells[i][part] += step
		p.sums[part] += step
		off, n = off+step, n-step
	}
}

func (p *panel) rows() int { return int((int64(len(p.cells)) + p.perRow - 1) / p.perRow) }

// shown returns the parts that occur.
func (p *panel) shown() (list []int) {
	for i, n := range p.sums {
		if n > 0 {
			list = append(list, i)
		}
	}
	return list
}

const (
	legendRow  = 28
	titleSpace = 46
)

// height is that of the panel with its title and legend.
func (p *panel) height() int {
	return titleSpace + p.rows()*(picRow+picGap) + 14 + (len(p.shown())+1)/2*legendRow + 18
}

// draw draws the panel from y on.
func (p *panel) draw(pic *picture.Picture, y int, title string) {
	const x = picMargin + picLabels
	pic.Text(x, y+24, picture.Large, picture.Left, ink, title)
	scale := fmt.Sprintf("one column = %s", humanSize(uint64(p.unit)))
	pic.Text(x+picRowWidth, y+24, picture.Large, picture.Right, faint, scale)
	y += titleSpace
	w := int(picRowWidth / p.perRow)
	every := max((p.rows()+11)/12, 1)
	for row := range p.rows() {
		if row%every == 0 {
			pic.Text(x-12, y+picRow, picture.Large, picture.Right, faint, humanSize(uint64(int64(row)*p.perRow*p.unit)))
		}
		for k := range p.perRow {
			i := int64(row)*p.perRow + k
			if i >= int64(len(p.cells)) {
				break
			}
			p.square(pic, x+int(k)*w, y, w, i)
		}
		y += picRow + picGap
	}
	y += 14
	for k, i := range p.shown() {
		lx, ly := x+k%2*picRowWidth/2, y+k/2*legendRow
		pic.Rect(lx, ly, 16, 16, faint)
		pic.Rect(lx+1, ly+1, 14, 14, p.parts[i].fill)
		pic.Text(lx+26, ly+15, picture.Large, picture.Left, ink, p.parts[i].name)
		share := fmt.Sprintf("%s (%s)", humanSize(uint64(p.sums[i])), percent(p.sums[i], p.size))
		pic.Text(lx+picRowWidth/2-24, ly+15, picture.Large, picture.Right, faint, share)
	}
}

func percent(n, of int64) string {
	p := 100 * float64(n) / float64(max(of, 1))
	if p < 0.1 {
		return "<0.1%"
	}
	return fmt.Sprintf("%.1f%%", p)
}

// square draws one square: its parts in layers, of which each that occurs can be seen.
func (p *panel) square(pic *picture.Picture, x, y, w int, i int64) {
	total := min(p.unit, p.size-i*p.unit)
	at, upTo := y+picRow, int64(0)
	for part, n := range p.cells[i] {
		if n == 0 || part == len(p.parts)-1 {
			continue
		}
		upTo += n
		top := min(y+picRow-int(upTo*picRow/total), at-1)
		if top = max(top, y); top < at {
			pic.Rect(x, top, w, at-top, p.parts[part].fill)
			at = top
		}
	}
	pic.Rect(x, y, w, at-y, p.parts[len(p.parts)-1].fill)
}

// drawLayout writes a picture of where an image's data lies.
func (a *app) drawLayout(ctx context.Context, src *source, name string) (err error) {
	write := map[string]func(*picture.Picture, io.Writer) error{".svg": (*picture.Picture).SVG, ".png": (*picture.Picture).PNG}[strings.ToLower(filepath.Ext(name))]
	if write == nil {
		return errorf("Pictures are SVG or PNG: the name must end with .svg or .png")
	}
	dev, err := a.openDevice(ctx, src, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	pic, err := layoutPicture(ctx, dev, src.name)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return errorf("Could not create '%s': %w", name, err)
	}
	if err := errors.Join(write(pic, f), f.Close()); err != nil {
		return errorf("Could not write '%s': %w", name, err)
	}
	return nil
}

// layoutPicture draws the disk as the guest sees it and, of a qcow2 image, the file.
func layoutPicture(ctx context.Context, dev block.Device, name string) (*picture.Picture, error) {
	im, _ := dev.(*qcow2.Image)
	least := int64(4096)
	if im != nil {
		least = max(im.ClusterSize(), 512)
	}
	disk := newPanel(dev.Size(), least, diskParts)
	if dev.Size() > 0 {
		err := dev.Extents(ctx, 0, dev.Size(), func(e block.Extent) bool {
			disk.add(e.Off, e.Len, diskPart(e))
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	panels, titles := []*panel{disk}, []string{"The disk, as the guest sees it: " + humanSize(uint64(dev.Size()))}
	note := ""
	if im != nil {
		l, err := im.HostLayout(ctx)
		if err != nil {
			return nil, err
		}
		file := newPanel(l.FileSize, least, fileParts)
		for i, s := range l.States {
			file.add(int64(i)*l.ClusterSize, l.ClusterSize, partOfHost[s])
		}
		panels, titles = append(panels, file), append(titles, "The file, from its beginning: "+humanSize(uint64(l.FileSize)))
		if free := file.sums[fileFree]; free >= l.FileSize/20 && free > 1<<20 {
			note = fmt.Sprintf("%s in the file are free: 'drover compact' gives them back.", humanSize(uint64(free)))
		}
	}
	height := 84
	for _, p := range panels {
		height += p.height() + 14
	}
	if note != "" {
		height += 30
	}
	pic := picture.New(2*picMargin+picLabels+picRowWidth, height, paper)
	y := 48
	pic.Text(picMargin, y, 3*picture.Small, picture.Left, ink, shorten(filepath.Base(name), 40))
	pic.Text(picMargin+picLabels+picRowWidth, y, picture.Large, picture.Right, faint, aboutImage(dev, im))
	y += 26
	for i, p := range panels {
		pic.Rect(picMargin, y-4, picLabels+picRowWidth, 1, blank)
		p.draw(pic, y, titles[i])
		y += p.height() + 14
	}
	if note != "" {
		pic.Text(picMargin+picLabels, y+12, picture.Large, picture.Left, ink, note)
	}
	return pic, nil
}

func aboutImage(dev block.Device, im *qcow2.Image) string {
	if im == nil {
		return dev.Info().Format
	}
	about := fmt.Sprintf("qcow2, clusters of %s", humanSize(uint64(im.ClusterSize())))
	if list, err := im.Snapshots(); err == nil && len(list) > 0 {
		about += fmt.Sprintf(", snapshots: %d", len(list))
	}
	return about
}

// shorten cuts a text that is too long for its place.
func shorten(s string, most int) string {
	r := []rune(s)
	if len(r) <= most {
		return s
	}
	return string(r[:most-3]) + "..."
}

func diskPart(e block.Extent) int {
	switch {
	case !e.Allocated:
		return diskNothing
	case e.Zero && e.HasHost && e.Depth == 0:
		return diskReserved
	case e.Zero:
		return diskZero
	case e.Depth > 0:
		return diskBacking
	case e.Compressed:
		return diskCompressed
	}
	return diskData
}

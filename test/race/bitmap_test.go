package race

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

const bitmapName = "race"

// useBitmap saves the bitmap in the middle of everything, or reads a part of it; what it says is out of date at once.
func (c *client) useBitmap(ctx context.Context, off, n int64) error {
	if c.r.IntN(2) == 0 {
		return c.im.SaveBitmaps(ctx)
	}
	var sum int64
	err := c.im.BitmapExtents(ctx, bitmapName, off, n, func(n int64, _ bool) bool {
		sum += n
		return true
	})
	if err == nil && sum != n {
		return fmt.Errorf("runs of the bitmap cover %d bytes of %d", sum, n)
	}
	return err
}

// judgeBitmap wants every sector that a request changed to be marked in the closed image, and the bitmap to be in order.
func (e *exploration) judgeBitmap(backing block.Device) {
	e.t.Helper()
	o := qcow2.Options{ReadOnly: true, Backing: kept{backing}.device()}
	if e.hasData() {
		o.DataFile = keptOpen{e.data}
	}
	im, err := qcow2.Open(e.t.Context(), keptOpen{e.base}, o)
	must(e.t, err)
	defer im.Close()
	marked := make([]bool, 0, im.Size()/sectorSize)
	must(e.t, im.BitmapExtents(e.t.Context(), bitmapName, 0, im.Size(), func(n int64, dirty bool) bool {
		for range n / sectorSize {
			marked = append(marked, dirty)
		}
		return true
	}))
	for _, q := range e.all {
		for s := q.sector; q.act == actSet && s < q.sector+q.n; s++ {
			if !marked[s] {
				e.t.Fatalf("%v: %s of sectors %d+%d: sector %d is not marked", e.scenario, q.name, q.sector, q.n, s)
			}
		}
	}
}

// kept is a device that outlives the image above it.
type kept struct{ block.Device }

func (kept) Close() error { return nil }

// device returns nil for no device.
func (k kept) device() block.Device {
	if k.Device == nil {
		return nil
	}
	return k
}

package check

import (
	"github.com/droverproject/drover/qcow2/internal/format"
)

// walkBitmaps counts the references of the bitmap directory and the bitmap tables. The tables may overlap.
func (c *checker) walkBitmaps() error {
	ext := c.h.Bitmaps
	if ext == nil {
		return nil
	}
	c.reference(ext.DirectoryOffset, ext.DirectorySize, 1)
	var list []format.Bitmap
	if c.inFile(ext.DirectoryOffset, ext.DirectorySize) {
		b, err := c.read(ext.DirectoryOffset, int64(ext.DirectorySize))
		if err != nil {
			return c.failed("the bitmap directory", ext.DirectoryOffset, err)
		}
		if list, err = format.ParseBitmapDirectory(b, c.h); err != nil {
			c.corrupt(1, at(ext.DirectoryOffset), "ERROR %v", err)
			c.rep.BitmapsBroken, c.blind = true, true
			return nil
		}
	} else {
		c.rep.BitmapsBroken, c.blind = true, true
	}
	var tables tableSpans
	for i := range list {
		tables.add(c, list[i].TableOffset, uint64(list[i].TableSize)*8)
	}
	c.bitmapTables = tables.clusters
	return tables.walk(c, "bitmap table", func(w, weight uint64) {
		e := format.BitmapEntry(w)
		switch {
		case !e.Valid(c.l):
			c.blind = true
			c.corrupt(weight, at(e.Offset()), "ERROR invalid bitmap table entry 0x%x", w)
		case e.Offset() != 0:
			c.reference(e.Offset(), uint64(c.l.ClusterSize()), weight)
		}
	})
}

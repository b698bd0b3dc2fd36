package cli

import (
	"context"
	"fmt"

	"github.com/droverproject/drover/block"
)

// guessedRaw warns of an image that is about to be written as raw only because nothing else is known of it.
const guessedRaw = `WARNING: Image format was not specified for '%s' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions.
`

// tellRepair tells of an image that was repaired because it was not closed cleanly. The programs that drover stands in for
// say nothing when there was nothing to repair.
func (a *app) tellRepair(name string, r block.Repair) {
	nothing := r.Errors == 0 && r.Leaks == 0 && r.ErrorsLeft == 0 && r.LeaksLeft == 0 && len(r.Notes) == 0
	if nothing && a.name != program {
		return
	}
	a.say("%s: %v", name, r)
}

// openDevice opens the disk inside an image, with the images below it.
func (a *app) openDevice(ctx context.Context, src *source, readOnly bool) (block.Device, error) {
	if err := src.checkFormat(); err != nil {
		return nil, err
	}
	if src.forceShare && !readOnly {
		return nil, errorf("Could not open '%s': force-share=on can only be used with read-only images", src.name)
	}
	o := src.openOptions()
	o.ReadOnly = readOnly
	o.OnRepair = a.tellRepair
	dev, err := block.Open(ctx, src.name, o)
	if err != nil {
		return nil, openError(src.name, err)
	}
	if !readOnly && src.format == "" && dev.Info().Format == block.FormatRaw {
		fmt.Fprintf(a.err, guessedRaw, src.name)
	}
	return dev, nil
}

package qcow2

import (
	"context"
	"fmt"
)

// FileInfo is ReadInfo for the file of an open image: what it says of itself when all that was written is in it.
func (im *Image) FileInfo(ctx context.Context) (*Info, error) {
	if !im.readOnly {
		if err := im.Flush(ctx); err != nil {
			return nil, fmt.Errorf("flushing before the image is described: %w", err)
		}
	}
	return ReadInfo(ctx, im.file)
}

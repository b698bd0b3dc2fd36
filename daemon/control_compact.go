package daemon

import (
	"context"
	"net/http"

	"github.com/droverproject/drover/qcow2"
)

// CompactRequest asks for an image to be compacted.
type CompactRequest struct {
	DryRun bool `json:"dry-run,omitempty"`
}

// CompactReply is what that has come to.
type CompactReply struct {
	OldSize int64 `json:"old-size"` // of the file
	NewSize int64 `json:"new-size"`
	Moved   int64 `json:"moved"`
	Free    int64 `json:"free"` // bytes that could not be filled
	Leaked  int64 `json:"leaked-clusters"`
	// SnapshotsOpen: clusters of snapshots stayed where they are, as some are being served.
	SnapshotsOpen bool `json:"snapshots-open"`
}

// compactDisk ends early when whoever asked for it goes: what has been moved stays so.
func compactDisk(_ context.Context, d *disk, r *http.Request) (any, error) {
	var req CompactRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return d.compact(r.Context(), req)
}

func (d *disk) compact(ctx context.Context, r CompactRequest) (CompactReply, error) {
	im, err := d.image()
	if err == nil && !r.DryRun {
		im, err = d.writable()
	}
	if err != nil {
		return CompactReply{}, err
	}
	rep, err := im.Compact(ctx, qcow2.CompactOptions{DryRun: r.DryRun})
	if err != nil {
		return CompactReply{}, err
	}
	return CompactReply{OldSize: rep.OldSize, NewSize: rep.NewSize, Moved: rep.Moved, Free: rep.Free, Leaked: rep.Leaked,
		SnapshotsOpen: rep.Open}, nil
}

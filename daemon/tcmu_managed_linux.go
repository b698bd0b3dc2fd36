package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/tcmu"
)

// tcmuService is what ServeTCMU runs, as the control API sees it.
type tcmuService struct {
	m      *tcmu.Manager
	memory *block.CacheBudget
	limit  int64
}

var _ Managed = (*tcmuService)(nil)

func (t *tcmuService) status(s *ServerStatus) {
	s.Kind = "tcmu"
	for _, d := range t.m.Devices() {
		if d.Disk != nil {
			s.Disks++
		}
	}
	s.CacheBytes, s.CacheLimit = t.memory.Used(), t.limit
}

const savedSize = "initiators are told of the new size; run 'targetcli saveconfig', or the next restore will ask for the old one"

func (t *tcmuService) disks() []*disk {
	var list []*disk
	for _, s := range t.m.Devices() {
		list = append(list, t.disk(s))
	}
	return list
}

func (t *tcmuService) disk(s tcmu.Status) *disk {
	hba := "user_" + s.HBA
	d := &disk{
		name: s.Name, others: []string{hba + "/" + s.Name, s.Config}, dev: s.Disk, served: s.Disk, note: savedSize,
		status: DiskStatus{Name: s.Name, HBA: hba, Config: s.Config, IO: IOStats{
			Inflight: s.Stats.Inflight, Requests: s.Stats.Commands, Reads: s.Stats.Reads, Writes: s.Stats.Writes,
			Flushes: s.Stats.Flushes, Discards: s.Stats.Unmaps, BytesRead: s.Stats.BytesRead, BytesWritten: s.Stats.BytesWritten,
			Errors: s.Stats.Errors,
		}},
	}
	if handler, rest, _ := strings.Cut(s.Config, "/"); tcmuFormats[handler] != "" {
		if c, err := parseDisk(tcmuFormats[handler], rest); err == nil {
			d.status.Image, d.status.Snapshot, d.status.ReadOnly = c.path, c.snapshot, c.readOnly
			d.others = append(d.others, c.path)
		}
	}
	if s.Disk == nil {
		d.status.State = StateFailed
		d.status.Error = fmt.Sprintf("%v (at %s)", s.Err, s.Since.UTC().Format(time.RFC3339))
		return d
	}
	if snap, ok := s.Disk.(*snapshotDisk); ok {
		d.dev = snap.image
	}
	d.resize = func(ctx context.Context, r ResizeRequest) error {
		if r.Size < d.dev.Size() {
			return conflictf("%q is a disk of initiators, who do not expect it to become smaller: take it away with targetcli,"+
				" shrink the image with 'drover resize --shrink', and create it again with its new size", d.name)
		}
		if r.Preallocation != "" && r.Preallocation != "off" {
			return invalidf("a disk of the target grows without preallocation")
		}
		return t.m.Resize(ctx, s.Device, r.Size)
	}
	d.apply = func(context.Context, func() error) error {
		return conflictf("%q is a disk of initiators, and the kernel does not tell whether one uses it: take it away with targetcli,"+
			" apply the snapshot with 'drover snapshot -a', and create it again", d.name)
	}
	return d
}

func (t *tcmuService) addExport(context.Context, ExportRequest) error {
	return invalidf("this server's disks are made with targetcli: 'targetcli /backstores/user:qcow2 create NAME SIZE IMAGE'")
}

func (t *tcmuService) removeExport(context.Context, string, bool) error {
	return invalidf("this server's disks are taken away with targetcli: 'targetcli /backstores/user:qcow2 delete NAME'")
}

package explore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

// OnSnapshots reports whether the request is one about snapshots.
func (op Op) OnSnapshots() bool { return op.Kind >= CreateSnapshot }

func (op Op) runSnapshot(im *qcow2.Image) error {
	ctx := context.Background()
	switch op.Kind {
	case CreateSnapshot:
		_, err := im.CreateSnapshot(ctx, op.Name)
		return err
	case ApplySnapshot:
		return im.ApplySnapshot(ctx, op.Name)
	case DeleteSnapshot:
		return im.DeleteSnapshot(ctx, op.Name)
	}
	return im.RenameSnapshot(ctx, op.Name, op.To)
}

// Model is what an image holds: the version of every sector of the disk, and of every sector of each snapshot.
type Model struct {
	Disk      []Version
	Snapshots map[string][]Version
}

// Model returns what the image holds before any request.
func (d *Disk) Model() Model {
	m := Model{make([]Version, d.Sectors), map[string][]Version{}}
	for s := range m.Disk {
		m.Disk[s] = d.Initial(int64(s))
	}
	if d.Snapshot {
		m.Snapshots["before"] = m.Disk
	}
	return m
}

// After returns what the image holds after a request that succeeded. m stays as it is.
func (m Model) After(op Op) Model {
	out := m
	switch {
	case op.Changes():
		out.Disk = slices.Clone(m.Disk)
		for s := op.First; s < op.First+op.N; s++ {
			out.Disk[s] = op.Version
		}
	case op.Kind == ApplySnapshot:
		out.Disk = m.Snapshots[op.Name]
	case op.OnSnapshots():
		out.Snapshots = maps.Clone(m.Snapshots)
		if op.Kind == RenameSnapshot {
			out.Snapshots[op.To] = m.Snapshots[op.Name]
		}
		delete(out.Snapshots, op.Name)
		if op.Kind == CreateSnapshot {
			out.Snapshots[op.Name] = m.Disk
		}
	}
	return out
}

// DrawWithSnapshots draws a request on an image that holds m; one in five is about snapshots. Names are unique.
func (d *Disk) DrawWithSnapshots(r *rand.Rand, v Version, m Model) Op {
	if r.IntN(5) > 0 {
		return d.Draw(r, v)
	}
	names := slices.Sorted(maps.Keys(m.Snapshots))
	fresh := fmt.Sprintf("v%d", v)
	k := r.IntN(8)
	if len(names) == 0 || k < 3 && len(names) < 4 {
		return Op{Kind: CreateSnapshot, Name: fresh}
	}
	op := Op{Kind: []Kind{DeleteSnapshot, DeleteSnapshot, DeleteSnapshot, ApplySnapshot, ApplySnapshot, ApplySnapshot, ApplySnapshot,
		RenameSnapshot}[k], Name: names[r.IntN(len(names))]}
	if op.Kind == RenameSnapshot {
		op.To = fresh
	}
	return op
}

// ReadVersions reads the versions of all sectors of a device.
func (d *Disk) ReadVersions(dev block.Device) ([]Version, error) {
	b := make([]byte, d.Sectors*SectorSize)
	if err := dev.ReadAt(context.Background(), b, 0); err != nil {
		return nil, err
	}
	list := make([]Version, d.Sectors)
	for s := range d.Sectors {
		p := b[s*SectorSize:][:SectorSize]
		v, ok := VersionOf(p, s)
		if !ok {
			return nil, fmt.Errorf("sector %d holds %x..., which no write put there", s, p[:16])
		}
		list[s] = v
	}
	return list, nil
}

// ReadModel reads all that an open image holds.
func (d *Disk) ReadModel(im *qcow2.Image) (Model, error) {
	disk, err := d.ReadVersions(im)
	if err != nil {
		return Model{}, err
	}
	m := Model{disk, map[string][]Version{}}
	list, err := im.Snapshots()
	if err != nil {
		return m, err
	}
	for _, s := range list {
		if m.Snapshots[s.Name], err = d.readSnapshot(im, s.ID); err != nil {
			return m, fmt.Errorf("snapshot %q: %w", s.Name, err)
		}
	}
	return m, nil
}

func (d *Disk) readSnapshot(im *qcow2.Image, id string) (list []Version, err error) {
	view, err := im.OpenSnapshot(context.Background(), id)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	return d.ReadVersions(view)
}

// Differs says how m differs from want, "" if it does not.
func (m Model) Differs(want Model) string {
	if s := differs(m.Disk, want.Disk); s != "" {
		return "disk: " + s
	}
	return m.SnapshotsDiffer(want)
}

// SnapshotsDiffer is Differs for the snapshots alone.
func (m Model) SnapshotsDiffer(want Model) string {
	names, wanted := slices.Sorted(maps.Keys(m.Snapshots)), slices.Sorted(maps.Keys(want.Snapshots))
	if !slices.Equal(names, wanted) {
		return fmt.Sprintf("snapshots %q, want %q", names, wanted)
	}
	for _, name := range names {
		if s := differs(m.Snapshots[name], want.Snapshots[name]); s != "" {
			return fmt.Sprintf("snapshot %q: %s", name, s)
		}
	}
	return ""
}

func differs(got, want []Version) string {
	for s := range want {
		if got[s] != want[s] {
			return fmt.Sprintf("sector %d holds version %d, want %d", s, got[s], want[s])
		}
	}
	return ""
}

// SnapshotStarts are the images on which snapshots are made.
func SnapshotStarts() []Start {
	return []Start{
		{Name: "tiny clusters", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10}},
		{Name: "tiny clusters, 64 bits, growth", Create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Size: 64 << 10}},
		{Name: "4k, version 2", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, Version: 2}},
		{Name: "tiny clusters, version 2", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10, Version: 2}},
		{Name: "4k, backing, odd size", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 128<<10 + 1536}, Backing: true},
		{Name: "4k, two bits", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, RefcountBits: 2}},
		{Name: "4k, preallocated", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 128 << 10, Preallocation: qcow2.PreallocMetadata}},
		{Name: "4k, lazy", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 192 << 10, LazyRefcounts: true}},
		{Name: "tiny clusters, lazy", Create: qcow2.CreateOptions{ClusterSize: 512, Size: 64 << 10, LazyRefcounts: true}},
		{Name: "subclusters, lazy", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true, LazyRefcounts: true}},
		{Name: "subclusters, backing", Create: qcow2.CreateOptions{ClusterSize: 32768, Size: 256<<10 + 1536, ExtendedL2: true}, Backing: true},
		{Name: "subclusters, compressed, snapshot", Create: qcow2.CreateOptions{ClusterSize: 16384, Size: 160 << 10, ExtendedL2: true},
			QEMU: []string{"-c", "-o", "extended_l2=on"}, Snapshot: true},
		{Name: "4k, compressed, snapshot", Create: qcow2.CreateOptions{ClusterSize: 4096, Size: 128 << 10}, QEMU: []string{"-c"}, Snapshot: true},
	}
}

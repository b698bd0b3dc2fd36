package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// Default bounds of an image's caches, in bytes.
const (
	DefaultCacheSize        = 32 << 20
	DefaultClusterCacheSize = 16 << 20
	// DefaultCacheCleanInterval is how often cached L2 tables are dropped that nobody used in the meantime.
	DefaultCacheCleanInterval = 10 * time.Minute
)

// Options say how an image is opened.
type Options struct {
	// Name is used in messages and in extents; empty means the file's own name.
	Name     string
	ReadOnly bool
	// Backing is what unallocated clusters read from; nil means zeroes. The image owns it and closes it.
	Backing block.Device
	// DataFile is the external data file, for images that have one. The image owns it and closes it.
	DataFile storage.File
	// Encrypt unlocks an encrypted image. Without it such an image opens too, but its data can be neither read nor written.
	Encrypt *EncryptOptions
	// CacheSize bounds the cache of L2 tables, ClusterCacheSize that of decompressed clusters; 0 means the default.
	CacheSize, ClusterCacheSize int64
	// RefcountCacheSize bounds what is kept of the refcounts, TotalCacheSize that and the cache of L2 tables together, and
	// CacheEntrySize is how much of an L2 table is read and kept together: a power of two of at least 512, at most a
	// cluster. 0 means the default.
	RefcountCacheSize, TotalCacheSize, CacheEntrySize int64
	// Memory, if not nil, bounds the caches of L2 tables of several images together.
	Memory *block.CacheBudget
	// CacheCleanInterval is how often cached L2 tables are dropped that nobody used in the meantime; 0 means the default,
	// a negative value never.
	CacheCleanInterval time.Duration
	// Overlap says which structures are protected from being written over; nil means all.
	Overlap *Structures
	// OnCorrupt, if not nil, is called once when the image has been marked corrupt because a change met impossible metadata. It
	// must not wait for the image.
	OnCorrupt func(error)
	// PassDiscardRequest, PassDiscardSnapshot and PassDiscardOther say whether the host gets the space of clusters back
	// that became free because the guest discarded them, because a snapshot was deleted, or for other reasons. By default
	// the first two are on and the last is off.
	PassDiscardRequest, PassDiscardSnapshot, PassDiscardOther Switch
	// DiscardNoUnref keeps the host clusters that the guest discards, so that they need not be found again. Their space is
	// given back to the host as PassDiscardRequest says.
	DiscardNoUnref bool
	// BitmapSaveInterval is how often an image that nobody writes to has its dirty bitmaps saved, so that a crash from then on
	// loses none of them; 0 means the default, a negative value never.
	BitmapSaveInterval time.Duration
	// LazyRefcounts says whether refcounts may stay in memory until the image is closed, with the dirty bit set meanwhile; by
	// default the header does. Version 3 only.
	LazyRefcounts Switch
	// OnRepair, if not nil, is told of the repair of an image that was not closed cleanly.
	OnRepair func(*RepairReport)
	// Journal, if not nil, has what was acknowledged survive this process, however it ends. Refcounts are then not postponed.
	Journal *Journal
}

// Switch is an option that has a default.
type Switch uint8

// The positions of a Switch.
const (
	SwitchDefault Switch = iota
	SwitchOn
	SwitchOff
)

func (s Switch) or(def bool) bool {
	if s == SwitchDefault {
		return def
	}
	return s == SwitchOn
}

// passDiscard returns which causes of a discard reach the host.
func (o *Options) passDiscard() meta.PassDiscard {
	return meta.PassDiscard{
		Request: o.PassDiscardRequest.or(true), Snapshot: o.PassDiscardSnapshot.or(true), Other: o.PassDiscardOther.or(false),
	}
}

// Image is an open QCOW2 image, a block.Device.
type Image struct {
	name    string
	file    storage.File
	data    storage.File // where guest clusters lie: file, or the external data file
	inFile  string       // its name; asking the file for it is a system call
	nowait  storage.NowaitReader
	dataEnd highWater // of an external data file
	packed  sync.Pool // *[]byte, one cluster long
	ones    sync.Pool // *[1][]byte: buffers of requests that have one
	ahead   readahead
	backing block.Device
	crypt   *encryption // nil when the image is not encrypted
	hdr     *format.Header
	lay     format.Layout
	size    atomic.Int64 // bytes of the disk; changed only by exclusive

	info     atomic.Pointer[block.Info]
	readOnly bool
	opts     Options // as given to Open
	views    snapshotViews
	parent   *Image // whose snapshot this is a view of; nil for an image proper
	headMu   sync.Mutex
	incompat uint64 // the incompatible features on the disk, under headMu
	broken   error  // set by exclusive when the metadata could not be read again: no request is served before it could
	wholes   uint64 // how often exclusive has run; changed only by it
	meta     *meta.Store
	bm       bitmaps
	clusters *clusterCache
	cow      sync.Pool     // *[]byte, two clusters long
	zeroedAt atomic.Uint64 // the epoch in which entries last became zero, see mayReuseZeroed

	stopSweeps chan struct{} // closed to end the goroutine that sweeps the cache, nil when there is none
	// stopFlushes is closed to end the goroutine that flushes before the journal is full, nil when there is none.
	stopFlushes chan struct{}
	swept       sync.WaitGroup

	life sync.RWMutex // held for reading by flushes, for writing by the end of Close
}

var (
	_ block.Device          = (*Image)(nil)
	_ block.OverwriteDevice = (*Image)(nil)
)

func init() {
	block.RegisterFormat(block.Format{Name: "qcow2", Probe: Probe, Open: openFormat, CheckOptions: checkOptions})
}

// Probe reports whether the first 512 bytes of a file are those of a QCOW2 image.
func Probe(head []byte) bool {
	return len(head) >= 8 && binary.BigEndian.Uint32(head) == format.Magic && binary.BigEndian.Uint32(head[4:]) >= format.Version2
}

// openFormat opens an image for block.Open: the files it names are opened through the caller's policy.
func openFormat(ctx context.Context, file storage.File, o block.FormatOptions) (block.Device, error) {
	hdr, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	opts := Options{Name: o.Name, ReadOnly: o.ReadOnly, OnCorrupt: o.OnCorrupt, Memory: o.Memory}
	if tell := o.OnRepair; tell != nil {
		opts.OnRepair = func(r *RepairReport) { tell(repairOf(r)) }
	}
	if err := opts.runtime(o.Options, hdr); err != nil {
		return nil, err
	}
	if opts.Encrypt, err = encryptOptions(hdr, o); err != nil {
		return nil, err
	}
	if hdr.Incompat&format.IncompatDataFile != 0 {
		if opts.DataFile, err = o.OpenDataFile(ctx, hdr.DataFileName); err != nil {
			return nil, fmt.Errorf("opening the external data file of %s: %w", o.Name, err)
		}
	}
	if opts.Backing, err = o.OpenBacking(ctx, hdr.BackingFile, hdr.BackingFormat); err != nil {
		closeAll(opts)
		return nil, fmt.Errorf("opening the backing file of %s: %w", o.Name, err)
	}
	if err := opts.keepWhatSurvives(o, hdr); err != nil {
		closeAll(opts)
		return nil, err
	}
	im, err := Open(ctx, file, opts)
	if err != nil {
		closeAll(opts)
		return nil, err
	}
	return im, nil
}

func closeAll(o Options) {
	if o.Journal != nil && o.Journal.Memory != nil {
		_ = o.Journal.Memory.Close(false)
	}
	if o.DataFile != nil {
		_ = o.DataFile.Close()
	}
	if o.Backing != nil {
		_ = o.Backing.Close()
	}
}

// Open opens the image in file. On success the image owns the file, the backing device and the data file; on failure
// they stay the caller's. An unknown incompatible feature is an *UnsupportedError; an image that this package reads but
// does not write is a *ReadOnlyError unless opened with ReadOnly. An image that was not closed cleanly is repaired first
// when it is opened for writing. The caller has locked the file.
func Open(ctx context.Context, file storage.File, o Options) (*Image, error) {
	hdr, err := readHeader(file)
	if err != nil {
		return nil, err
	}
	im := newImage(file, hdr, o)
	if err := im.refuse(o); err != nil {
		return nil, err
	}
	crypt, err := openEncryption(ctx, file, hdr, o.Encrypt)
	if err != nil {
		return nil, err
	}
	restored, err := recoverJournal(ctx, file, hdr, o)
	if err != nil {
		return nil, err
	}
	if restored { // which may have moved the refcount table
		if hdr, err = readHeader(file); err != nil {
			return nil, err
		}
		im = newImage(file, hdr, o)
	}
	if !o.ReadOnly && hdr.Incompat&format.IncompatDirty != 0 {
		if im, err = reopenRepaired(ctx, file, o); err != nil {
			return nil, err
		}
	}
	im.crypt = crypt
	if err := im.openData(o); err != nil {
		return nil, err
	}
	if err := im.openMeta(o); err != nil {
		return nil, err
	}
	if err := im.loadBitmaps(); err != nil {
		return nil, err
	}
	if !im.readOnly {
		if err := im.startJournal(); err != nil {
			return nil, err
		}
	}
	im.noteInfo()
	im.startSweeps(o.CacheCleanInterval)
	im.flushWhenAsked()
	im.startSaves(o.BitmapSaveInterval)
	return im, nil
}

// newImage makes an image of a header, without its metadata.
func newImage(file storage.File, hdr *format.Header, o Options) *Image {
	im := &Image{name: o.Name, file: file, data: file, backing: o.Backing, hdr: hdr, lay: hdr.Layout(),
		readOnly: o.ReadOnly, opts: o}
	im.opts.Encrypt = nil // no secret is kept
	im.size.Store(hdr.DiskSize())
	im.incompat = hdr.Incompat
	im.inFile = file.Stat().Name
	if im.name == "" {
		im.name = im.inFile
	}
	im.nowait, _ = im.data.(storage.NowaitReader)
	cs := int(im.lay.ClusterSize())
	im.ones.New = func() any { return new([1][]byte) }
	im.cow.New = func() any { b := make([]byte, 2*cs); return &b }
	im.clusters = newClusterCache(or(o.ClusterCacheSize, DefaultClusterCacheSize), int64(cs))
	return im
}

// startSweeps has a goroutine give idle cache memory back from time to time.
func (im *Image) startSweeps(every time.Duration) {
	if every == 0 {
		every = DefaultCacheCleanInterval
	}
	if every < 0 {
		return
	}
	im.stopSweeps = make(chan struct{})
	im.swept.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				im.meta.Map.Sweep()
			case <-im.stopSweeps:
				return
			}
		}
	})
}

func or(v, def int64) int64 {
	if v == 0 {
		return def
	}
	return v
}

// readHeader reads and validates the header area: at most one cluster.
func readHeader(file storage.File) (*format.Header, error) {
	head := make([]byte, storage.SectorSize)
	if err := storage.ReadFull(file, head, 0); err != nil {
		return nil, fmt.Errorf("reading header: %w", err)
	}
	n, err := format.HeaderArea(head)
	if err != nil {
		return nil, err
	}
	area := make([]byte, n)
	if err := storage.ReadFull(file, area, 0); err != nil {
		return nil, fmt.Errorf("reading header: %w", err)
	}
	return format.ParseHeader(area)
}

// refuse returns why the image cannot be opened as asked.
func (im *Image) refuse(o Options) error {
	h := im.hdr
	if err := im.refuseData(o); err != nil {
		return err
	}
	if o.ReadOnly {
		return nil
	}
	var why []string
	for _, c := range []struct {
		yes bool
		why string
	}{
		{im.file.Stat().ReadOnly, "the file is read-only"},
		{h.Incompat&format.IncompatCorrupt != 0, ReasonCorrupt},
		{im.lay.DataFile && h.SnapshotCount > 0, "it has both an external data file and internal snapshots"},
		{im.lay.DataFile && o.DataFile.Stat().ReadOnly, "the external data file is read-only"},
		{im.raw() && h.CryptMethod != format.CryptNone, "it is encrypted, and its external data file is to be a raw image"},
	} {
		if c.yes {
			why = append(why, c.why)
		}
	}
	if why != nil {
		return &ReadOnlyError{why}
	}
	return nil
}

func (im *Image) openMeta(o Options) error {
	c, err := im.metaConfig(o)
	if err != nil {
		return err
	}
	im.meta, err = meta.Open(c)
	return err
}

// metaConfig describes the metadata that the header names.
func (im *Image) metaConfig(o Options) (meta.Config, error) {
	h := im.hdr
	sizes, err := o.cacheSizes(im.lay, h.DiskSize())
	if err != nil {
		return meta.Config{}, err
	}
	c := meta.Config{
		File: im.file, Layout: im.lay, Writable: !im.readOnly,
		L1Off: h.L1Offset, L1Len: int64(h.L1Size),
		RefTableOff: h.RefTableOffset, RefTableLen: int64(h.RefTableLen),
		SnapshotsOff: h.SnapshotsOffset,
		CacheBytes:   sizes.L2, SliceBytes: sizes.L2Entry, RefcountBytes: sizes.Refcount, Memory: o.Memory,
		OnFree:      func(r meta.ClusterRun) { im.clusters.drop(im.lay, r) },
		PassDiscard: o.passDiscard(),
		Lazy:        im.lazy(), Dirty: h.Incompat&format.IncompatDirty != 0, WriteDirty: im.writeDirty,
		DataFile:     o.DataFile,
		WriteCorrupt: im.markCorrupt, OnCorrupt: im.tellCorrupt,
	}
	if im.readOnly {
		return c, nil
	}
	snapshots, n, err := readSnapshots(im.file, h)
	if err != nil {
		return c, err
	}
	im.places(&c, o, snapshots, n)
	return c, nil
}

// readSnapshots reads the snapshot table and returns its entries and its length in bytes.
func readSnapshots(f storage.File, h *format.Header) ([]format.Snapshot, int64, error) {
	if h.SnapshotCount == 0 {
		return nil, 0, nil
	}
	if err := h.ValidateSnapshotPointer(); err != nil {
		return nil, 0, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, 0, fmt.Errorf("size of image file: %w", err)
	}
	most := min(size-int64(h.SnapshotsOffset), format.MaxSnapshotTable)
	for n := int64(64 << 10); ; n *= 4 {
		n = max(min(n, most), 0)
		b := make([]byte, n)
		if err := storage.ReadFull(f, b, int64(h.SnapshotsOffset)); err != nil {
			return nil, 0, fmt.Errorf("reading snapshot table at host offset %#x: %w", h.SnapshotsOffset, err)
		}
		list, used, err := format.ParseSnapshots(b, int(h.SnapshotCount), h)
		if err == nil {
			return list, int64(used), nil
		}
		if n >= most {
			return nil, 0, fmt.Errorf("reading snapshot table at host offset %#x: %w", h.SnapshotsOffset, err)
		}
	}
}

// Size returns the length of the disk in bytes.
func (im *Image) Size() int64 { return im.size.Load() }

// ClusterSize returns the unit in bytes in which the image maps the disk, 0 once it is closed.
func (im *Image) ClusterSize() int64 {
	t, err := im.enter() // operations on the whole image read the header again
	if err != nil {
		return 0
	}
	defer im.meta.Epochs.Exit(t)
	return im.lay.ClusterSize()
}

// Version returns the version of the format, 2 or 3, and 0 once the image is closed.
func (im *Image) Version() int {
	t, err := im.enter()
	if err != nil {
		return 0
	}
	defer im.meta.Epochs.Exit(t)
	return int(im.hdr.Version)
}

// Info tells what the device can do.
func (im *Image) Info() block.Info { return *im.info.Load() }

func (im *Image) noteInfo() {
	cs, unit := int(im.lay.ClusterSize()), 1
	if im.crypt != nil {
		unit = luks.SectorSize
	}
	im.info.Store(&block.Info{
		Format: "qcow2", Name: im.name, ReadOnly: im.readOnly,
		MinAlign: unit, PreferAlign: max(4096, min(cs, 64<<10)), DiscardAlign: int(im.lay.SubclusterSize()),
		FastZero: im.lay.Version >= format.Version3, Volatile: true, Survives: im.meta.Journal() != nil,
	})
}

// Flush makes every change that had returned before the call durable, data and metadata.
func (im *Image) Flush(ctx context.Context) error {
	storage.Tell(im.file, storage.EventFlushToOS)
	im.life.RLock()
	defer im.life.RUnlock()
	t, err := im.enter()
	if err != nil {
		return err
	}
	// The ticket is given back before the flush: a flush waits for no request, and frees what it unlinked only when
	// every request that began before has ended.
	im.meta.Epochs.Exit(t)
	return im.meta.Flush(ctx)
}

// enter begins a request.
func (im *Image) enter() (meta.Ticket, error) {
	for {
		t, err := im.meta.Epochs.Enter()
		if err != nil {
			return t, block.ErrClosed
		}
		if im.broken == nil {
			return t, nil
		}
		im.meta.Epochs.Exit(t)
		if err := im.meta.Exclusive(context.Background(), im.mend); errors.Is(err, meta.ErrClosed) {
			return t, block.ErrClosed
		} else if err != nil {
			return t, err
		}
	}
}

// tryEnter is enter without waiting.
func (im *Image) tryEnter() (meta.Ticket, bool) {
	t, ok := im.meta.Epochs.TryEnter()
	if ok && im.broken != nil {
		im.meta.Epochs.Exit(t)
		return t, false
	}
	return t, ok
}

// Close waits for the requests running, makes everything durable and closes the files below, whatever fails. The error
// is the first that happened.
func (im *Image) Close() error {
	if im.parent != nil {
		return im.closeView()
	}
	if !im.meta.Epochs.Close() {
		return block.ErrClosed
	}
	for _, view := range im.views.all() {
		_ = view.Close() // which fails only if somebody else closes it
	}
	if im.stopSweeps != nil {
		close(im.stopSweeps)
	}
	if im.stopFlushes != nil {
		close(im.stopFlushes)
	}
	im.bm.stopSaves()
	im.swept.Wait()
	defer im.meta.Map.Forget()
	err := im.meta.Settle()
	var bitmapErr error
	if err == nil {
		bitmapErr = im.closeBitmaps()
	}
	if err == nil {
		err = im.meta.CloseClean()
	}
	if err == nil {
		im.meta.CutEnd()
		err = im.closeJournal()
	}
	im.life.Lock()
	defer im.life.Unlock()
	errs := []error{err, bitmapErr, im.leaveJournal(err == nil), im.file.Close()}
	if im.data != im.file {
		errs = append(errs, im.data.Close())
	}
	if im.backing != nil {
		errs = append(errs, im.backing.Close())
	}
	return errors.Join(errs...)
}

// Backing returns the device below, nil when there is none.
func (im *Image) Backing() block.Device { return im.backing }

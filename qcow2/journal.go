package qcow2

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/journal"
	"github.com/droverproject/drover/storage"
)

// Journal has everything that an image has acknowledged survive the end of this process, whatever ends it: what changed in
// the mapping since the last flush is noted in memory that outlives the process, and the next opening with the same journal
// brings it back. A power cut loses what was not flushed, as ever.
//
// While it is used, the header says so in its autoclear features (see docs/format-notes.md), so that a journal is never
// brought back into an image that somebody else has changed meanwhile. Version 2 of the format has no such features, images with
// internal snapshots must not have them (ErrJournalSnapshots), and images that are marked dirty by an operation that stopped half
// way are as their refcounts leave them: there, and without memory, every change is flushed before it is acknowledged, and so is what the journal has no room for.
type Journal struct {
	// Memory is where the journal lies; nil: there is none. The image owns it, as it does its file.
	Memory storage.SharedMemory
	// Identity tells the image, its external data file, and the boot of the host.
	Identity string
	// OnRecover, if not nil, is told what an earlier process left.
	OnRecover func(JournalReport)
	// Once: what an earlier process left is brought back, and no journal is used from then on.
	Once bool
}

// JournalReport says what became of what a journal held when an image was opened.
type JournalReport = block.JournalReport

var (
	// ErrJournalStale is what JournalReport.Lost wraps when the journal is not the image's last one: somebody else opened the
	// image for writing since.
	ErrJournalStale = errors.New("the image was opened for writing since by somebody who did not know the journal")
	// ErrJournalMissing is what it wraps when the image was used with a journal that is not in the memory.
	ErrJournalMissing = errors.New("the image was used with a journal that is not here; after a power cut that is as it must be")
	// ErrJournalVersion is what JournalReport.None wraps for an image in version 2 of the format.
	ErrJournalVersion = errors.New("version 2 of the format cannot say that a journal is in use")
	// ErrJournalSnapshots is what it wraps for an image with internal snapshots. The mark of a journal is an autoclear feature, and
	// qemu-img check -r takes all snapshots out of an image in which it finds one that it does not know: no power cut may leave
	// both.
	ErrJournalSnapshots = errors.New("stock tools that repair an image marked as used with a journal remove its snapshots")
	// ErrJournalForeign is for a journal of another image, or of another boot of the host.
	ErrJournalForeign = journal.ErrForeign
)

// JournalError says that a journal holds acknowledged writes that cannot be brought back. The image is not opened: without
// the journal, that is to say once it was removed, it can be.
type JournalError struct{ Err error }

func (e *JournalError) Error() string {
	return "bringing back what was acknowledged but not flushed: " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *JournalError) Unwrap() error { return e.Err }

func (o *Journal) identity() journal.Identity { return sha256.Sum256([]byte(o.Identity)) }

func (o *Journal) tell(r JournalReport) {
	if o.OnRecover != nil {
		o.OnRecover(r)
	}
}

// journalNonce returns what the header says of the journal in use, 0 when there is none.
func journalNonce(h *format.Header) uint32 {
	if h.Version < format.Version3 {
		return 0
	}
	return uint32(h.Autoclear >> format.AutoclearJournalShift)
}

// recoverJournal brings back what an earlier process recorded and did not flush. It comes before everything else that may
// allocate clusters or free them, a repair above all: what records name is unused by all that the disk says.
func recoverJournal(ctx context.Context, file storage.File, hdr *format.Header, o Options) (restored bool, err error) {
	jo := o.Journal
	if jo == nil || jo.Memory == nil || o.ReadOnly {
		return false, nil
	}
	found, err := journal.Read(jo.Memory.Bytes(), jo.identity())
	switch {
	case errors.Is(err, journal.ErrForeign):
		jo.tell(JournalReport{Lost: err})
		return false, nil
	case err != nil:
		return false, &JournalError{err}
	case len(found.Records) == 0:
		if found.Nonce == 0 && journalNonce(hdr) != 0 && !jo.Once {
			jo.tell(JournalReport{Lost: ErrJournalMissing})
		}
		return false, nil
	case found.Nonce != journalNonce(hdr):
		jo.tell(JournalReport{Changes: len(found.Records), Lost: ErrJournalStale})
		return false, nil
	}
	clusters, err := restoreMapping(ctx, file, hdr, o, found.Records)
	if err != nil {
		return false, &JournalError{err}
	}
	if jo.Once {
		journal.Clear(jo.Memory.Bytes())
	}
	jo.tell(JournalReport{Changes: len(found.Records), Clusters: clusters})
	return true, nil
}

// restoreMapping works on an image of its own, from which nothing is left but what it made durable.
func restoreMapping(ctx context.Context, file storage.File, hdr *format.Header, o Options, list []journal.Record) (int64, error) {
	im := newImage(file, hdr, o)
	if err := im.openData(o); err != nil {
		return 0, err
	}
	if err := im.openMeta(o); err != nil {
		return 0, err
	}
	im.noteInfo()
	defer im.meta.Map.Forget()
	return im.meta.Restore(ctx, list, int64(hdr.L1Size)*im.lay.L2Entries())
}

// startJournal begins a journal. What the memory held has been brought back, or is lost. It also clears the autoclear features
// of what this package does not maintain, before the first write makes them untrue. One aligned field: a power cut
// leaves it old or new. That it says which journal is in use need not be durable: after a power cut there is none.
func (im *Image) startJournal() error {
	features := im.hdr.Autoclear & format.AutoclearKnown
	if jo := im.opts.Journal; jo != nil && !jo.Once {
		j := journal.None()
		if jo.Memory != nil {
			journal.Clear(jo.Memory.Bytes())
		}
		if jo.Memory != nil && noJournal(im.hdr) == nil {
			nonce := newNonce()
			var err error
			if j, err = journal.Start(jo.Memory.Bytes(), jo.identity(), nonce); err != nil {
				return err
			}
			features |= uint64(nonce) << format.AutoclearJournalShift
		}
		im.meta.KeepJournal(j)
		// What an earlier process acknowledged is the business of this one's first flush.
		if err := im.meta.SyncAll(); err != nil {
			return err
		}
	}
	return im.setAutoclear(features)
}

// noJournal returns why an image cannot be used with a journal.
func noJournal(h *format.Header) error {
	switch {
	case h.Version < format.Version3:
		return ErrJournalVersion
	case h.SnapshotCount > 0:
		return ErrJournalSnapshots
	}
	return nil
}

// unmarkJournal takes the mark from the header before there is a snapshot. Everything is durable, and no request runs; when the
// header is read again after the operation, every change is flushed from then on.
func (im *Image) unmarkJournal() error {
	if journalNonce(im.hdr) == 0 {
		return nil
	}
	b := format.EncodeUint64(im.hdr.Autoclear & format.AutoclearKnown)
	return im.writeField(format.OffAutoclear, b[:])
}

func newNonce() uint32 {
	for {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails
		if n := binary.NativeEndian.Uint32(b[:]); n != 0 {
			return n
		}
	}
}

// setAutoclear changes the autoclear features of the header.
func (im *Image) setAutoclear(features uint64) error {
	if im.hdr.Version < format.Version3 || im.hdr.Autoclear == features {
		return nil
	}
	return im.meta.Gated(func() error {
		b := format.EncodeUint64(features)
		if err := im.meta.WriteNow(b[:], format.OffAutoclear); err != nil {
			return fmt.Errorf("changing autoclear features in the header: %w", err)
		}
		if err := im.meta.SyncNow(); err != nil {
			return err
		}
		im.hdr.Autoclear = features
		return nil
	})
}

// flushWhenAsked has a goroutine flush before the journal is full.
func (im *Image) flushWhenAsked() {
	j := im.meta.Journal()
	if j == nil {
		return
	}
	im.stopFlushes = make(chan struct{})
	im.swept.Go(func() {
		for {
			select {
			case <-j.Wake():
				// A failure is told to whoever flushes next, as every change does from then on.
				_ = im.meta.Flush(context.Background())
			case <-im.stopFlushes:
				return
			}
		}
	})
}

// keep returns when what the request that ends has changed, or built upon, survives this process. It is called outside of
// every request.
func (im *Image) keep(ctx context.Context) error {
	if j := im.meta.Journal(); j == nil || !j.Outstanding() {
		return nil
	}
	return im.meta.Flush(ctx)
}

// outstanding reports whether what is seen of the mapping may still be lost with this process.
func (im *Image) outstanding() bool {
	j := im.meta.Journal()
	return j != nil && j.Outstanding()
}

// journalReloaded is called when the header was read again after an operation on the whole image: without the mark in it
// the journal is of no use.
func (im *Image) journalReloaded() {
	if j := im.meta.Journal(); j != nil && journalNonce(im.hdr) == 0 {
		j.Detach()
	}
}

// closeJournal takes the mark from the header. Everything is on the disk.
func (im *Image) closeJournal() error {
	if im.meta.Journal() == nil || journalNonce(im.hdr) == 0 || im.meta.Corrupt() != nil {
		return nil
	}
	return im.setAutoclear(im.hdr.Autoclear & format.AutoclearKnown)
}

// leaveJournal gives the memory back; done: its content is needed no more.
func (im *Image) leaveJournal(done bool) error {
	im.meta.LeaveJournal()
	if jo := im.opts.Journal; jo != nil && jo.Memory != nil {
		return jo.Memory.Close(done)
	}
	return nil
}

// JournalSnapshot returns a copy of the journal's memory as it would be left if the process ended now, nil when there is
// none. It is for tests.
func (im *Image) JournalSnapshot() []byte {
	if j := im.meta.Journal(); j != nil {
		return j.Snapshot()
	}
	return nil
}

// keepWhatSurvives finds the journal of an image that is opened by its name.
func (o *Options) keepWhatSurvives(fo block.FormatOptions, hdr *format.Header) error {
	if fo.ReadOnly || fo.OpenJournal == nil || !fo.Keep && journalNonce(hdr) == 0 {
		return nil
	}
	jo := &Journal{OnRecover: fo.OnJournal, Once: !fo.Keep}
	var err error
	jo.Memory, jo.Identity, err = fo.OpenJournal(o.DataFile)
	switch {
	case err == nil:
	case errors.Is(err, os.ErrNotExist) || journalNonce(hdr) == 0:
		// Nothing was left behind.
		if !fo.Keep {
			return nil
		}
		jo.Memory = nil
		fo.OnJournal(JournalReport{None: err})
	default:
		return fmt.Errorf("the image was used with a journal, which holds what was not flushed: %w", err)
	}
	if why := noJournal(hdr); why != nil && jo.Memory != nil && journalNonce(hdr) == 0 {
		err := jo.Memory.Close(true)
		jo.Memory = nil
		fo.OnJournal(JournalReport{None: errors.Join(why, err)})
	}
	o.Journal = jo
	return nil
}

package block

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"

	"github.com/droverproject/drover/storage"
)

// DefaultJournalDir is where journals are by default: memory that does not outlive the host.
const DefaultJournalDir = "/run/drover/journal"

// JournalSize is how long new journals are.
const JournalSize = 3<<20 + 4096

// Keep says how what a device acknowledged survives this process. A write that changes no metadata survives in the host's
// page cache. What changes metadata is noted in a journal, and brought back when the image is next opened for writing; without
// one it is flushed before it is acknowledged.
type Keep struct {
	// Dir is the folder of the journals, one file for each image in use; empty: DefaultJournalDir.
	Dir string
	// NoJournal has no journals used.
	NoJournal bool
	// OnJournal, if not nil, is told what became of the journal of the image called name.
	OnJournal func(name string, r JournalReport)
}

// JournalReport says what became of what a journal held when an image was opened.
type JournalReport struct {
	Changes  int   // that the journal held
	Clusters int64 // guest clusters whose mapping was brought back
	// Lost is why nothing was: acknowledged writes that no flush covered are not in the image.
	Lost error
	// None is why no journal is used from now on.
	None error
}

// keep has a format find the journal of the image of l, if that is what is written to. Also who wants none finds the one that
// was left behind.
func (l *layer) keep(fo *FormatOptions, file storage.File) {
	k := l.o.Keep
	fo.OnJournal = func(JournalReport) {}
	if l != l.top || fo.ReadOnly {
		return
	}
	dir := DefaultJournalDir
	if k != nil {
		fo.Keep, dir = true, cmp.Or(k.Dir, dir)
		if tell := k.OnJournal; tell != nil {
			fo.OnJournal = func(r JournalReport) { tell(l.path, r) }
		}
	}
	create := k != nil && !k.NoJournal
	fo.OpenJournal = func(data storage.File) (storage.SharedMemory, string, error) {
		return openJournal(dir, file, data, create)
	}
}

// openJournal opens the journal of an image by what identifies its file: names change.
func openJournal(dir string, file, data storage.File, create bool) (storage.SharedMemory, string, error) {
	id, err := identify(file)
	if err != nil {
		return nil, "", err
	}
	var dataID fileID
	if data != nil {
		if dataID, err = identify(data); err != nil {
			return nil, "", err
		}
	}
	name, err := id.name()
	if err != nil {
		return nil, "", err
	}
	boot, err := storage.BootID()
	if err != nil {
		return nil, "", fmt.Errorf("asking which boot of the host this is: %w", err)
	}
	mem, err := storage.OpenShared(filepath.Join(dir, name), JournalSize, create)
	return mem, fmt.Sprintf("%s %v %v", boot, id, dataID), err
}

var errNoIdentity = fmt.Errorf("the image file cannot be told from others: %w", os.ErrNotExist)

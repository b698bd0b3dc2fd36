package block

import (
	"context"

	"github.com/droverproject/drover/storage"
)

// Format is a way to find a disk inside a file.
type Format struct {
	Name string
	// Probe reports whether a file whose first 512 bytes (zero-extended) are head is of this format.
	Probe func(head []byte) bool
	// CheckOptions refuses options that Open would refuse whatever the image is; nil checks none.
	CheckOptions func(options map[string]string) error
	// Open makes a device of a file that is already locked. On success the device owns the file and closes it; on
	// failure the caller does.
	Open func(ctx context.Context, file storage.File, o FormatOptions) (Device, error)
}

// FormatOptions is what a format gets beside its file.
type FormatOptions struct {
	Name     string            // of the file, for messages
	ReadOnly bool              // the device refuses changes, and the file must not be written
	Options  map[string]string // runtime options by QEMU's names, for example "l2-cache-size"
	// Memory, if not nil, bounds what the caches of several devices take together.
	Memory *CacheBudget
	// Secret looks up a secret that an option names. It is never nil.
	Secret func(id string) ([]byte, error)
	NoData bool // data will be neither read nor written
	// OnCorrupt, if not nil, is called once when the image has been marked corrupt. It must not wait for the image.
	OnCorrupt func(error)
	// OnRepair, if not nil, is told of the repair of an image that was not closed cleanly.
	OnRepair func(Repair)
	// OpenBacking opens the backing file that the image names (or that the caller put in its place), read-only. format
	// is what the image says of it, "" when it says nothing. A name of "" says that the image names none; the options may.
	// It applies the caller's policy. It returns nil and no
	// error when the caller wants the image without its backing: what the image does not hold then reads as zeroes.
	OpenBacking func(ctx context.Context, name, format string) (Device, error)
	// OpenDataFile opens the external data file that the image names ("" when it names none).
	OpenDataFile func(ctx context.Context, name string) (storage.File, error)
	// Keep: what the device acknowledges must survive this process.
	Keep bool
	// OpenJournal returns memory that outlives this process, for this image with that external data file (nil: none). It is
	// an error that is os.ErrNotExist where there is none and none is to be made, and nil where nobody opens files by names.
	// The device owns the memory when it owns the file.
	OpenJournal func(data storage.File) (storage.SharedMemory, string, error)
	// OnJournal is told what became of a journal. It is never nil.
	OnJournal func(JournalReport)
}

var formats = registry[Format]{kind: "format"}

// RegisterFormat makes a format known to Open. A format's package calls it from its init function; registering a name
// twice panics, since that is a mistake in the program.
func RegisterFormat(f Format) { formats.register(f.Name, f) }

// Formats returns the names of the registered formats in alphabetical order.
func Formats() []string { return formats.names() }

func lookupFormat(name string) (Format, bool) { return formats.lookup(name) }

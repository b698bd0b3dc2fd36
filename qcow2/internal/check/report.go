package check

import (
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// Kind says how bad a finding is.
type Kind uint8

const (
	// Corruption: the image is wrong, and using it may lose data.
	Corruption Kind = iota
	// Leak: host clusters are counted as used that nothing refers to. Harmless but for the space.
	Leak
	// Failure: something could not be checked.
	Failure
)

// String returns the kind's name.
func (k Kind) String() string {
	switch k {
	case Corruption:
		return "corruption"
	case Leak:
		return "leak"
	}
	return "failure"
}

// Finding is one fault.
type Finding struct {
	Kind Kind
	// Times is how often the fault counts: more than once if it lies in a table that is referred to more than once.
	Times uint64
	// Host is the host offset that the fault is about.
	Host format.HostOff
	// Guest is the offset on the virtual disk that is concerned, if HasGuest.
	Guest    format.GuestOff
	HasGuest bool
	// Repaired: the finding is not of the check but says what the repair does about one.
	Repaired bool
	// Message says what is wrong, in QEMU's words where QEMU has words for it.
	Message string
}

// Report is the outcome of a check. The numbers are those of qemu-img check.
type Report struct {
	CheckErrors int64 // things that could not be checked
	Corruptions int64
	Leaks       int64

	// ImageEndOffset is the end of the last cluster in use.
	ImageEndOffset int64

	TotalClusters      int64 // of the virtual disk
	AllocatedClusters  int64 // guest clusters that have a host cluster, compressed ones included
	FragmentedClusters int64 // of those, the ones that do not follow their predecessor on the host
	CompressedClusters int64

	// Findings holds the first faults found; FindingsDropped is how many more there were.
	Findings        []Finding
	FindingsDropped int64

	// Rebuild: the refcount structures themselves are damaged, so that a repair cannot mend single refcounts but must
	// build them anew.
	Rebuild bool
	// BitmapsBroken: the bitmap directory cannot be understood. What the bitmaps own is therefore among the leaks.
	BitmapsBroken bool
	// Dirty and Corrupt are the header's feature bits, which say what to expect.
	Dirty, Corrupt bool
}

// Clean reports whether nothing at all was found.
func (r *Report) Clean() bool { return r.CheckErrors == 0 && r.Corruptions == 0 && r.Leaks == 0 }

// Options controls a check.
type Options struct {
	// MaxFindings is how many findings Report.Findings keeps; 0 stands for 1000. All are counted.
	MaxFindings int
	// OnFinding, if not nil, is called for every finding.
	OnFinding func(Finding)
	// Progress, if not nil, is told how many of the L2 tables have been walked, by one goroutine at a time.
	Progress func(done, total int64)
}

const defaultMaxFindings = 1000

// place is where a finding is.
type place struct {
	host     format.HostOff
	guest    format.GuestOff
	hasGuest bool
}

func at(host format.HostOff) place { return place{host: host} }

// found counts a fault that occurs times times, and keeps it if there is room. The message is only made if somebody
// will see it: a hostile image has millions of faults.
func (c *checker) found(kind Kind, times uint64, p place, message string, args ...any) {
	if times == 0 {
		return
	}
	switch kind {
	case Corruption:
		c.rep.Corruptions += int64(times)
	case Leak:
		c.rep.Leaks += int64(times)
	case Failure:
		c.rep.CheckErrors += int64(times)
	}
	if len(c.rep.Findings) >= c.maxFindings && c.opts.OnFinding == nil {
		c.rep.FindingsDropped++
		return
	}
	c.keep(Finding{Kind: kind, Times: times, Host: p.host, Guest: p.guest, HasGuest: p.hasGuest,
		Message: fmt.Sprintf(message, args...)})
}

// keep keeps a finding that was counted, if there is room.
func (c *checker) keep(f Finding) {
	if len(c.rep.Findings) < c.maxFindings {
		c.rep.Findings = append(c.rep.Findings, f)
	} else {
		c.rep.FindingsDropped++
	}
	if c.opts.OnFinding != nil {
		c.opts.OnFinding(f)
	}
}

func (c *checker) corrupt(times uint64, p place, message string, args ...any) {
	c.found(Corruption, times, p, message, args...)
}

package qcow2

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// The least that caches hold, in entries, and the default length of an L2 cache entry. They are QEMU's.
const (
	minL2Entries       = 2
	minRefcountEntries = 4
	defaultCacheEntry  = 4096
	// defaultRefcountCache is how much of the refcounts is kept by default, if that is more than the least.
	defaultRefcountCache = 2 << 20
)

// CacheSizes are the bounds of an image's metadata caches, in bytes.
type CacheSizes struct {
	L2, L2Entry, Refcount int64
}

// CacheSizes returns the bounds in effect.
func (im *Image) CacheSizes() CacheSizes {
	sizes, err := im.opts.cacheSizes(im.lay, im.Size())
	if err != nil {
		return CacheSizes{} // Open has refused such options
	}
	return sizes
}

// cacheSizes works out the bounds by QEMU's rules: of cache-size, l2-cache-size and refcount-cache-size at most two may be
// given. What is given alone as cache-size goes to the L2 tables as far as there are any, the rest to the refcounts. By
// default the L2 cache covers the whole disk, up to DefaultCacheSize, or up to the shared budget where there is one.
func (o *Options) cacheSizes(lay format.Layout, diskSize int64) (CacheSizes, error) {
	cs := lay.ClusterSize()
	allL2 := lay.ClustersFor(lay.ClustersFor(diskSize)*lay.L2EntrySize()) * cs
	l2Set, refSet := o.CacheSize > 0, o.RefcountCacheSize > 0
	most := int64(DefaultCacheSize)
	if o.Memory != nil {
		most = math.MaxInt64
	}
	s := CacheSizes{L2: min(allL2, most), L2Entry: min(cs, defaultCacheEntry), Refcount: o.RefcountCacheSize}
	if l2Set {
		s.L2 = min(allL2, o.CacheSize)
	}
	switch total := o.TotalCacheSize; {
	case total <= 0:
		if !refSet {
			s.Refcount = defaultRefcountCache
		}
	case l2Set && refSet:
		return s, errors.New("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
	case l2Set && o.CacheSize > total:
		return s, errors.New("l2-cache-size may not exceed cache-size")
	case refSet && o.RefcountCacheSize > total:
		return s, errors.New("refcount-cache-size may not exceed cache-size")
	case l2Set:
		s.Refcount = total - s.L2
	case refSet:
		s.L2 = total - s.Refcount
	case total >= allL2+minRefcountEntries*cs:
		s.L2, s.Refcount = allL2, total-allL2
	default:
		s.Refcount = min(total, minRefcountEntries*cs)
		s.L2 = total - s.Refcount
	}
	if n := o.CacheEntrySize; n != 0 {
		if n < format.SectorSize || n > cs || n&(n-1) != 0 {
			return s, fmt.Errorf("L2 cache entry size must be a power of two between %d and the cluster size (%d)", format.SectorSize, cs)
		}
		s.L2Entry = n
	}
	s.L2 = max(s.L2/s.L2Entry, minL2Entries) * s.L2Entry
	s.Refcount = max(s.Refcount/cs, minRefcountEntries) * cs
	return s, nil
}

// runtimeOptions are the options that go by QEMU's names, apart from overlap-check and its switches.
var runtimeOptions = map[string]func(o *Options, name, value string) error{
	"cache-size":            sizeOption(func(o *Options) *int64 { return &o.TotalCacheSize }),
	"l2-cache-size":         sizeOption(func(o *Options) *int64 { return &o.CacheSize }),
	"refcount-cache-size":   sizeOption(func(o *Options) *int64 { return &o.RefcountCacheSize }),
	"l2-cache-entry-size":   sizeOption(func(o *Options) *int64 { return &o.CacheEntrySize }),
	"cache-clean-interval":  setCleanInterval,
	"lazy-refcounts":        switchOption(func(o *Options) *Switch { return &o.LazyRefcounts }),
	"pass-discard-request":  switchOption(func(o *Options) *Switch { return &o.PassDiscardRequest }),
	"pass-discard-snapshot": switchOption(func(o *Options) *Switch { return &o.PassDiscardSnapshot }),
	"pass-discard-other":    switchOption(func(o *Options) *Switch { return &o.PassDiscardOther }),
	"discard-no-unref": func(o *Options, name, value string) (err error) {
		o.DiscardNoUnref, err = parseBool(name, value)
		return err
	},
}

// runtime takes over the options that go by QEMU's names, for an image with this header.
func (o *Options) runtime(byName map[string]string, hdr *format.Header) error {
	for _, name := range slices.Sorted(maps.Keys(byName)) { // so that of several errors it is always the same that is told
		value := byName[name]
		if name == "overlap-check" || strings.HasPrefix(name, "overlap-check.") {
			continue
		}
		if name == "encrypt.format" || name == "encrypt.key-secret" || strings.HasPrefix(name, "backing.") {
			continue // encryptOptions and the image below take them
		}
		set := runtimeOptions[name]
		if set == nil {
			return fmt.Errorf("Block format 'qcow2' does not support the option '%s'", name) //nolint:staticcheck // QEMU's text
		}
		if err := set(o, name, value); err != nil {
			return err
		}
	}
	if hdr.Version < format.Version3 && o.LazyRefcounts == SwitchOn {
		return errors.New("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level") //nolint:staticcheck // QEMU's text
	}
	if hdr.Version < format.Version3 && o.DiscardNoUnref {
		return errors.New("discard-no-unref is only supported since qcow2 version 3")
	}
	return o.overlapOptions(byName)
}

// checkOptions is block.Format.CheckOptions.
func checkOptions(byName map[string]string) error {
	return new(Options).runtime(byName, &format.Header{Version: format.Version3})
}

// sizeOption sets a number of bytes. A cache of nothing is the least there is.
func sizeOption(field func(*Options) *int64) func(*Options, string, string) error {
	return func(o *Options, name, value string) error {
		n, err := block.ParseSize(value)
		if err != nil || n < 0 {
			return fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64\n"+
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.", name) //nolint:staticcheck // QEMU's text
		}
		*field(o) = max(n, 1)
		return nil
	}
}

func switchOption(field func(*Options) *Switch) func(*Options, string, string) error {
	return func(o *Options, name, value string) error {
		on, err := parseBool(name, value)
		if err != nil {
			return err
		}
		*field(o) = SwitchOff
		if on {
			*field(o) = SwitchOn
		}
		return nil
	}
}

func parseBool(name, value string) (bool, error) {
	switch value {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, fmt.Errorf("Parameter '%s' expects 'on' or 'off'", name) //nolint:staticcheck // QEMU's text
}

func setCleanInterval(o *Options, name, value string) error {
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return fmt.Errorf("Parameter '%s' expects a number", name) //nolint:staticcheck // QEMU's text
	}
	if n > math.MaxUint32 {
		return errors.New("Cache clean interval too big") //nolint:staticcheck // QEMU's text
	}
	o.CacheCleanInterval = time.Duration(n) * time.Second
	if n == 0 {
		o.CacheCleanInterval = -1
	}
	return nil
}

// overlapTemplates and overlapSwitches go by QEMU's names.
var (
	overlapTemplates = map[string]Structures{
		"none": OverlapNone, "constant": OverlapConstant, "cached": OverlapCached, "all": OverlapAll,
	}
	overlapSwitches = map[string]Structures{
		"main-header": MainHeader, "active-l1": ActiveL1, "active-l2": ActiveL2, "refcount-table": RefcountTable,
		"refcount-block": RefcountBlock, "snapshot-table": SnapshotTable, "inactive-l1": InactiveL1, "inactive-l2": InactiveL2,
		"bitmap-directory": BitmapDirectory,
	}
)

// overlapOptions works out which structures are watched: those of the template (by default all), with the single switches on
// top.
func (o *Options) overlapOptions(byName map[string]string) error {
	const prefix = "overlap-check."
	short, hasShort := byName["overlap-check"]
	long, hasLong := byName[prefix+"template"]
	if hasShort && hasLong && short != long {
		return fmt.Errorf("Conflicting values for qcow2 options 'overlap-check' ('%s') and 'overlap-check.template' ('%s')", short, long) //nolint:staticcheck // QEMU's text
	}
	watch, any := OverlapAll, hasShort || hasLong
	if any {
		template := short
		if hasLong {
			template = long
		}
		var ok bool
		if watch, ok = overlapTemplates[template]; !ok {
			return fmt.Errorf("Unsupported value '%s' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all", template) //nolint:staticcheck // QEMU's text
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) { // so that of several errors it is always the same that is told
		value := byName[name]
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok || rest == "template" {
			continue
		}
		kind, ok := overlapSwitches[rest]
		if !ok {
			return fmt.Errorf("Block format 'qcow2' does not support the option '%s'", name) //nolint:staticcheck // QEMU's text
		}
		on, err := parseBool(name, value)
		if err != nil {
			return err
		}
		any = true
		if watch &^= kind; on {
			watch |= kind
		}
	}
	if any {
		o.Overlap = &watch
	}
	return nil
}

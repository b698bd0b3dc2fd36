package qcow2

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2/internal/format"
)

// TestCacheSizes pins the arithmetic of the cache options to a table of cases worked out by QEMU's rules.
func TestCacheSizes(t *testing.T) {
	const cs, k, m, g = 64 << 10, 1 << 10, 1 << 20, int64(1) << 30
	lay := format.Layout{ClusterBits: 16, RefcountOrder: 4, Version: 3}
	ext := lay
	ext.ExtendedL2 = true
	for _, c := range []struct {
		name string
		lay  format.Layout
		size int64
		o    Options
		want CacheSizes
		err  string
	}{
		{"default covers the disk", lay, 64 * g, Options{}, CacheSizes{8 * m, 4096, 2 * m}, ""},
		{"default of a large disk", lay, 1024 * g, Options{}, CacheSizes{32 * m, 4096, 2 * m}, ""},
		{"extended entries are twice as long", ext, 64 * g, Options{}, CacheSizes{16 * m, 4096, 2 * m}, ""},
		{"shared budget: as if without a bound", lay, 1024 * g, Options{Memory: block.NewCacheBudget(1)}, CacheSizes{128 * m, 4096, 2 * m}, ""},
		{"no more than the tables", lay, 64 * g, Options{CacheSize: 100 * m}, CacheSizes{8 * m, 4096, 2 * m}, ""},
		{"at least two entries", lay, 64 * g, Options{CacheSize: 1}, CacheSizes{8192, 4096, 2 * m}, ""},
		{"at least two entries of 64K", lay, 64 * g, Options{CacheSize: 1, CacheEntrySize: cs}, CacheSizes{2 * cs, cs, 2 * m}, ""},
		{"whole entries", lay, 64 * g, Options{CacheSize: 10000, CacheEntrySize: 512}, CacheSizes{9728, 512, 2 * m}, ""},
		{"at least four refcount blocks", lay, 64 * g, Options{RefcountCacheSize: 1}, CacheSizes{8 * m, 4096, 4 * cs}, ""},
		{"together: L2 first", lay, 64 * g, Options{TotalCacheSize: 10 * m}, CacheSizes{8 * m, 4096, 2 * m}, ""},
		{"together: little", lay, 64 * g, Options{TotalCacheSize: m}, CacheSizes{m - 4*cs, 4096, 4 * cs}, ""},
		{"together: less than four blocks", lay, 64 * g, Options{TotalCacheSize: 100 * k}, CacheSizes{8192, 4096, 4 * cs}, ""},
		{"together and L2", lay, 64 * g, Options{TotalCacheSize: 4 * m, CacheSize: m}, CacheSizes{m, 4096, 3 * m}, ""},
		{"together and refcounts", lay, 64 * g, Options{TotalCacheSize: 4 * m, RefcountCacheSize: m}, CacheSizes{3 * m, 4096, m}, ""},
		{"all three", lay, 64 * g, Options{TotalCacheSize: m, CacheSize: m, RefcountCacheSize: m}, CacheSizes{},
			"cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"},
		{"L2 too large", lay, 64 * g, Options{TotalCacheSize: m, CacheSize: 2 * m}, CacheSizes{}, "l2-cache-size may not exceed cache-size"},
		{"refcounts too large", lay, 64 * g, Options{TotalCacheSize: m, RefcountCacheSize: 2 * m}, CacheSizes{}, "refcount-cache-size may not exceed cache-size"},
		{"entry size", lay, g, Options{CacheEntrySize: 1000}, CacheSizes{}, "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
		{"entry size too large", lay, g, Options{CacheEntrySize: 2 * cs}, CacheSizes{}, "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"},
	} {
		got, err := c.o.cacheSizes(c.lay, c.size)
		switch {
		case c.err != "" && (err == nil || err.Error() != c.err):
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		case c.err == "" && (err != nil || got != c.want):
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
}

// TestRuntimeOptionErrors gives wrong options to drover and to stock qemu-io, which must say the same.
func TestRuntimeOptionErrors(t *testing.T) {
	image := ""
	if _, err := exec.LookPath("qemu-io"); err == nil {
		image = filepath.Join(t.TempDir(), "image.qcow2")
		if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", image, "64M").CombinedOutput(); err != nil {
			t.Fatalf("qemu-img: %v: %s", err, out)
		}
	}
	hdr := &format.Header{Version: 3, ClusterBits: 16, Size: 64 << 20}
	for text, want := range map[string]string{
		"cache-size=1M,l2-cache-size=1M,refcount-cache-size=1M":  "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
		"cache-size=1M,l2-cache-size=2M":                         "l2-cache-size may not exceed cache-size",
		"cache-size=1M,refcount-cache-size=2M":                   "refcount-cache-size may not exceed cache-size",
		"l2-cache-entry-size=1000":                               "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
		"l2-cache-entry-size=128K":                               "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
		"overlap-check=some":                                     "Unsupported value 'some' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all",
		"overlap-check.template=some":                            "Unsupported value 'some' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all",
		"overlap-check=all,overlap-check.template=none":          "Conflicting values for qcow2 options 'overlap-check' ('all') and 'overlap-check.template' ('none')",
		"overlap-check.active-l1=maybe":                          "Parameter 'overlap-check.active-l1' expects 'on' or 'off'",
		"overlap-check.active-l3=on":                             "Block format 'qcow2' does not support the option 'overlap-check.active-l3'",
		"lazy-refcounts=maybe":                                   "Parameter 'lazy-refcounts' expects 'on' or 'off'",
		"pass-discard-other=maybe":                               "Parameter 'pass-discard-other' expects 'on' or 'off'",
		"cache-clean-interval=soon":                              "Parameter 'cache-clean-interval' expects a number",
		"cache-clean-interval=99999999999":                       "Cache clean interval too big",
		"l2-cache-size=much":                                     "Parameter 'l2-cache-size' expects a non-negative number below 2^6",
		"unknown=1":                                              "Block format 'qcow2' does not support the option 'unknown'",
		"overlap-check=all,overlap-check.template=all":           "",
		"cache-size=0":                                           "",
		"overlap-check.template=none,overlap-check.active-l1=on": "",
	} {
		o, opts := Options{}, map[string]string{}
		for _, part := range strings.Split(text, ",") {
			key, value, _ := strings.Cut(part, "=")
			opts[key] = value
		}
		err := o.runtime(opts, hdr)
		if err == nil {
			_, err = o.cacheSizes(hdr.Layout(), 64<<20)
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
		if image == "" {
			continue
		}
		out, _ := exec.Command("qemu-io", "-c", "open -o "+text+" "+image).CombinedOutput()
		if want == "" && len(out) > 0 || !strings.Contains(string(out), want) {
			t.Errorf("stock with %s: %s, want %q", text, out, want)
		}
	}
}

// TestRuntimeOptions takes every option over.
func TestRuntimeOptions(t *testing.T) {
	var o Options
	err := o.runtime(map[string]string{
		"l2-cache-size": "1M", "refcount-cache-size": "2M", "cache-size": "3M", "l2-cache-entry-size": "512", "cache-clean-interval": "0",
		"lazy-refcounts": "on", "pass-discard-request": "off", "pass-discard-snapshot": "off", "pass-discard-other": "on",
		"discard-no-unref": "on", "overlap-check": "constant", "overlap-check.active-l1": "off", "overlap-check.inactive-l2": "on",
	}, &format.Header{Version: 3})
	if err != nil {
		t.Fatal(err)
	}
	if o.CacheSize != 1<<20 || o.RefcountCacheSize != 2<<20 || o.TotalCacheSize != 3<<20 || o.CacheEntrySize != 512 ||
		o.CacheCleanInterval >= 0 || o.LazyRefcounts != SwitchOn || o.PassDiscardRequest != SwitchOff ||
		o.PassDiscardSnapshot != SwitchOff || o.PassDiscardOther != SwitchOn || !o.DiscardNoUnref {
		t.Errorf("options are %+v", o)
	}
	if want := OverlapConstant&^ActiveL1 | InactiveL2; o.watched() != want {
		t.Errorf("watched is %b, want %b", o.watched(), want)
	}
	if (Options{}).watched() != OverlapAll {
		t.Error("by default not everything is watched")
	}
	for _, name := range []string{"lazy-refcounts", "discard-no-unref"} {
		if err := new(Options).runtime(map[string]string{name: "on"}, &format.Header{Version: 2}); err == nil {
			t.Errorf("%s for version 2 is accepted", name)
		}
	}
}

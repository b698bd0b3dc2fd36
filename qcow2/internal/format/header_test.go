package format

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// run runs one of QEMU's tools and returns what it printed; the test is skipped if the tool is not there.
func run(t testing.TB, tool string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("%s is not installed", tool)
	}
	cmd := exec.Command(tool, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

func mustRun(t testing.TB, tool string, args ...string) string {
	t.Helper()
	out, err := run(t, tool, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func create(t testing.TB, path string, args ...string) []byte {
	t.Helper()
	args = append([]string{"create", "-q", "-f", "qcow2", path}, args...)
	_, err := run(t, "qemu-img", args...)
	for i := 0; i < 10 && err != nil && strings.Contains(err.Error(), "Unable to get accurate CPU usage"); i++ {
		_, err = run(t, "qemu-img", args...) // LUKS measures the host, and gives up when that is too fast
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parse parses a header from just the bytes that HeaderArea asks for.
func parse(t testing.TB, b []byte) *Header {
	t.Helper()
	n, err := HeaderArea(b[:min(len(b), SectorSize)])
	if err != nil {
		t.Fatal(err)
	}
	h, err := ParseHeader(b[:min(int64(len(b)), n)])
	if err != nil {
		t.Fatal(err)
	}
	return h
}

type imageInfo struct {
	VirtualSize   int64  `json:"virtual-size"`
	ClusterSize   int64  `json:"cluster-size"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Dirty         bool   `json:"dirty-flag"`
	Encrypted     bool   `json:"encrypted"`
	Specific      struct {
		Data struct {
			Compat      string
			Compression string `json:"compression-type"`
			Bits        int    `json:"refcount-bits"`
			Lazy        bool   `json:"lazy-refcounts"`
			Corrupt     bool
			ExtendedL2  bool   `json:"extended-l2"`
			DataFile    string `json:"data-file"`
			DataFileRaw bool   `json:"data-file-raw"`
			Bitmaps     []struct{ Name string }
		}
	} `json:"format-specific"`
}

func TestParseWhatQEMUMakes(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.qcow2")
	create(t, base, "1G")
	luks := []string{"--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"}
	options := [][]string{{"1G"}, {"1000"}, {"0"}, {"-o", "compat=0.10", "3M"}, {"-o", "lazy_refcounts=on", "1M"},
		{"-b", base, "-F", "qcow2", "1M"}, {"-o", "compat=0.10", "-b", base, "-F", "qcow2"}, {"-o", "compression_type=zstd", "1M"},
		{"-o", "extended_l2=on", "1M"}, {"-o", "extended_l2=on,cluster_size=16k,refcount_bits=64", "1M"},
		{"-o", "data_file=" + filepath.Join(dir, "data"), "1M"},
		{"-o", "data_file=" + filepath.Join(dir, "raw") + ",data_file_raw=on", "1M"}, append(luks, "1M"),
		{"-o", "preallocation=metadata", "5M"}}
	for cb := MinClusterBits; cb <= MaxClusterBits; cb++ {
		options = append(options, []string{"-o", fmt.Sprintf("cluster_size=%d", 1<<cb), "1M"})
	}
	for bits := 1; bits <= 64; bits *= 2 {
		options = append(options, []string{"-o", fmt.Sprintf("refcount_bits=%d", bits), "1M"})
	}
	for i, opts := range options {
		t.Run(strings.ReplaceAll(strings.Join(opts, " "), dir, ""), func(t *testing.T) {
			path := filepath.Join(dir, strconv.Itoa(i)+".qcow2")
			b := create(t, path, opts...)
			h := parse(t, b)
			compareInfo(t, path, h)
			if whole, err := ParseHeader(b); err != nil || !cmp.Equal(whole, h) {
				t.Errorf("the whole file gives another header: %v\n%s", err, cmp.Diff(whole, h))
			}
			checkMarshal(t, h, b)
		})
	}
}

// compareInfo compares a header with what qemu-img info says.
func compareInfo(t *testing.T, path string, h *Header) {
	t.Helper()
	var info imageInfo
	if err := json.Unmarshal([]byte(mustRun(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	data, l := info.Specific.Data, h.Layout()
	compat := map[uint32]string{Version2: "0.10", Version3: "1.1"}[h.Version]
	got := []any{h.DiskSize(), l.ClusterSize(), h.BackingFile, h.BackingFormat, h.Incompat&IncompatDirty != 0,
		h.CryptMethod != CryptNone, compat, h.CompressionType.String(), l.RefcountBits(), h.Compat&CompatLazyRefcounts != 0,
		h.Incompat&IncompatCorrupt != 0, l.ExtendedL2, h.DataFileName, h.Autoclear&AutoclearRawData != 0, h.Bitmaps != nil}
	want := []any{info.VirtualSize, info.ClusterSize, info.Backing, info.BackingFormat, info.Dirty, info.Encrypted, data.Compat,
		data.Compression, data.Bits, data.Lazy, data.Corrupt, data.ExtendedL2, data.DataFile, data.DataFileRaw,
		len(data.Bitmaps) > 0}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("qemu-img info and ParseHeader differ:\n%s", d)
	}
}

// checkMarshal checks that a header comes out as it was in the file, zeroes behind it, and parses to the same again.
func checkMarshal(t *testing.T, h *Header, file []byte) {
	t.Helper()
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	cluster := make([]byte, h.Layout().ClusterSize())
	copy(cluster, b)
	want := zeroExtend(file, len(cluster))[:len(cluster)]
	if !bytes.Equal(cluster, want) {
		t.Errorf("Marshal differs from what QEMU wrote")
	}
	again, err := ParseHeader(b)
	if err != nil || !cmp.Equal(h, again) {
		t.Errorf("Marshal and ParseHeader: %v\n%s", err, cmp.Diff(h, again))
	}
}

func TestParseBitmapsQEMUMakes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.qcow2")
	create(t, path, "1G")
	mustRun(t, "qemu-img", "bitmap", "--add", "-g", "32k", path, "first")
	mustRun(t, "qemu-img", "bitmap", "--add", "--disable", path, "second, with a longer name")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h := parse(t, b)
	compareInfo(t, path, h)
	checkMarshal(t, h, b)
	dir := b[h.Bitmaps.DirectoryOffset:][:h.Bitmaps.DirectorySize]
	list, err := ParseBitmapDirectory(dir, h)
	if err != nil {
		t.Fatal(err)
	}
	want := []Bitmap{
		{TableSize: 1, Flags: BitmapAuto, GranularityBits: 15, Name: "first"},
		{TableSize: 1, GranularityBits: 16, Name: "second, with a longer name"},
	}
	for i := range want {
		if i < len(list) {
			want[i].TableOffset = list[i].TableOffset
		}
	}
	if d := cmp.Diff(want, list); d != "" {
		t.Errorf("bitmap directory:\n%s", d)
	}
	out, err := MarshalBitmapDirectory(list, h)
	if err != nil || !bytes.Equal(out, dir) {
		t.Errorf("MarshalBitmapDirectory: %v\n% x, want\n% x", err, out, dir)
	}
}

func TestParseSnapshotsQEMUMakes(t *testing.T) {
	for _, opts := range [][]string{{"1G"}, {"-o", "compat=0.10", "1G"}} {
		path := filepath.Join(t.TempDir(), "s.qcow2")
		create(t, path, opts...)
		for i := range 3 {
			mustRun(t, "qemu-img", "snapshot", "-c", "snap"+strings.Repeat("x", i), path)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		h := parse(t, b)
		list, n, err := ParseSnapshots(b[h.SnapshotsOffset:], int(h.SnapshotCount), h)
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range list {
			if s.ID != strconv.Itoa(i+1) || s.Name != "snap"+strings.Repeat("x", i) || s.DiskSize != 1<<30 || s.ICount != 0 ||
				s.ExtraSize != NewSnapshotExtraSize || s.L1Size != h.L1Size || s.DateSec == 0 {
				t.Errorf("snapshot %d: %+v", i, s)
			}
		}
		out, err := MarshalSnapshots(list)
		if err != nil || !bytes.Equal(out, b[h.SnapshotsOffset:][:n]) {
			t.Errorf("MarshalSnapshots: %v; %d bytes, want %d", err, len(out), n)
		}
		for cut := range n { // every shorter table asks for more, and never makes anything up
			part, _, err := ParseSnapshots(b[h.SnapshotsOffset:][:cut], 3, h)
			if err == nil || err.Error() != "unexpected EOF" || !cmp.Equal(part, list[:len(part)]) {
				t.Fatalf("table cut to %d bytes: %d entries, %v", cut, len(part), err)
			}
		}
	}
}

func put32(off int, v uint32) func([]byte) {
	return func(b []byte) { binary.BigEndian.PutUint32(b[off:], v) }
}

func put64(off int, v uint64) func([]byte) {
	return func(b []byte) { binary.BigEndian.PutUint64(b[off:], v) }
}

func put8(off int, v byte) func([]byte) { return func(b []byte) { b[off] = v } }

func all(fs ...func([]byte)) func([]byte) {
	return func(b []byte) {
		for _, f := range fs {
			f(b)
		}
	}
}

// ext puts one extension (and an end) behind the header.
func ext(kind, length uint32, data ...byte) func([]byte) {
	return func(b []byte) {
		off := int(binary.BigEndian.Uint32(b[OffHeaderLength:]))
		if binary.BigEndian.Uint32(b[OffVersion:]) == 2 {
			off = HeaderLengthV2
		}
		clear(b[off:4096])
		put32(off, kind)(b)
		put32(off+4, length)(b)
		copy(b[off+8:], data)
	}
}

// mutations are faults (and oddities) of a header. refused holds a part of QEMU's words, "" for an accepted one.
var mutations = []struct {
	name    string
	mutate  func([]byte)
	refused string
}{
	{"nothing", func([]byte) {}, ""},
	{"magic", put8(0, 0), "not in qcow2 format"},
	{"version 0", put32(4, 0), "Unsupported qcow2 version 0"},
	{"version 1", put32(4, 1), "Unsupported qcow2 version 1"},
	{"version 4", put32(4, 4), "Unsupported qcow2 version 4"},
	{"version 2", all(put32(4, 2), ext(0, 0)), ""},
	{"backing offset beyond cluster", put64(8, 65537), "Invalid backing file offset"},
	{"backing offset at end, no name", put64(8, 65536), ""},
	{"backing offset at end, a name", all(put64(8, 65536), put32(16, 1)), "Backing file name too long"},
	{"backing offset huge", put64(8, 1<<63), "Invalid backing file offset"},
	{"backing offset within header, no name", put64(8, 8), ""},
	{"backing offset ends area within extension", put64(8, 120), "Header extension too large"},
	{"backing offset ends area within extension head", put64(8, 116), "Header extension too large"},
	{"backing name 1024", all(put64(8, 1024), put32(16, 1024)), "Backing file name too long"},
	{"backing size without offset", put32(16, 5000), ""},
	{"cluster bits 8", put32(20, 8), "Unsupported cluster size: 2^8"},
	{"cluster bits 22", put32(20, 22), "Unsupported cluster size: 2^22"},
	{"cluster bits huge", put32(20, 1<<31), "Unsupported cluster size"},
	{"cluster bits 9", put32(20, 9), "L1 table is too small"},
	{"cluster bits 9, extensions do not fit", all(put32(20, 9), put32(36, 1<<15), put32(100, 120)), "Header extension too large"},
	{"size odd", put64(24, 1001), ""},
	{"size 0", put64(24, 0), ""},
	{"size beyond L1", put64(24, 1<<31), "L1 table is too small"},
	{"size with a huge L1", put64(24, 0x7ffffffffffffe00), "Image is too big"},
	{"size 1<<63", put64(24, 1<<63), "Image is too big"},
	{"size all ones", put64(24, 1<<64-1), ""},
	{"crypt 3", put32(32, 3), "Unsupported encryption method 3"},
	{"crypt LUKS without header", put32(32, 2), "CRYPTO header"},
	{"L1 size 0", put32(36, 0), "L1 table is too small"},
	{"L1 larger than needed", put32(36, 100), ""},
	{"L1 at the limit", put32(36, 0x400000), ""},
	{"L1 beyond the limit", put32(36, 0x400001), "Active L1 table too large"},
	{"L1 offset unaligned", put64(40, 0x30001), "Active L1 table offset invalid"},
	{"L1 offset huge", put64(40, 1<<63), "Active L1 table offset invalid"},
	{"L1 ends beyond the largest offset", put64(40, 0x7fffffffffff0000), "Active L1 table offset invalid"},
	{"reftable unaligned", put64(48, 0x10200), "Reference count table offset invalid"},
	{"reftable offset huge", put64(48, 1<<63), "Reference count table offset invalid"},
	{"reftable clusters 0", put32(56, 0), "does not contain a reference count table"},
	{"reftable at the limit", put32(56, 128), ""},
	{"reftable beyond the limit", put32(56, 129), "Reference count table too large"},
	{"reftable clusters huge", put32(56, 1<<32-1), "Reference count table too large"},
	{"snapshots 65537", put32(60, 65537), "Snapshot table too large"},
	{"snapshot offset unaligned", put64(64, 1), "Snapshot table offset invalid"},
	{"snapshot offset huge", put64(64, 1<<63), "Snapshot table offset invalid"},
	{"dirty", put64(72, IncompatDirty), ""},
	{"corrupt", put64(72, IncompatCorrupt), ""},
	{"compression bit without type", put64(72, IncompatCompression), "incompatible feature bit must not be set"},
	{"compression type without bit", put8(104, 1), "incompatible feature bit must be set"},
	{"zstd", all(put64(72, IncompatCompression), put8(104, 1)), ""},
	{"unknown compression type", all(put64(72, IncompatCompression), put8(104, 2)), "unknown compression type"},
	{"extended L2", all(put64(72, IncompatExtL2), put32(36, 4)), ""},
	{"extended L2 with an L1 for plain L2", put64(72, IncompatExtL2), "L1 table is too small"},
	{"extended L2, small clusters", all(put64(72, IncompatExtL2), put32(20, 13), put32(36, 100), put64(48, 0x2000)), "Unsupported subcluster size"},
	{"unknown incompatible bit 5", put64(72, 1<<5), "Unknown incompatible feature: 20"},
	{"unknown incompatible bits", put64(72, 1<<63|1<<17|1), "Unknown incompatible feature: 8000000000020000"},
	{"unknown incompatible bit with a name", all(put64(72, 1<<7|1<<40), put8(120+1, 7)), "qcow2 feature(s): dirty bit, Unknown incompatible feature: 10000000000"},
	{"unknown compatible bits", put64(80, 1<<63|1<<5), ""},
	{"unknown autoclear bits", put64(88, 1<<63|1<<5), ""},
	{"bitmaps bit without extension", put64(88, AutoclearBitmaps), ""},
	{"raw bit without data file", put64(88, AutoclearRawData), "data-file-raw requires a data file"},
	{"refcount order 7", put32(96, 7), "Reference count entry width too large"},
	{"refcount order 6", put32(96, 6), ""},
	{"header length 0", put32(100, 0), "header too short"},
	{"header length 103", put32(100, 103), "header too short"},
	{"header length 104", all(put32(100, 104), ext(0, 0)), ""},
	{"header length 105", all(put32(100, 105), ext(0, 0)), ""},
	{"header length 104 hides the compression type", all(put32(100, 104), ext(1<<24, 0), put64(112, 0)), ""},
	{"header length 128", all(put32(100, 128), ext(0, 0)), ""},
	{"header length a cluster", put32(100, 65536), ""},
	{"header length beyond a cluster", put32(100, 65537), "header exceeds cluster size"},
	{"extension too long", ext(0x12345678, 65536), "Header extension too large"},
	{"extension to the end", ext(0x12345678, 65536-120), ""},
	{"extension length huge", ext(0x12345678, 1<<32-1), "Header extension too large"},
	{"unknown extension", ext(0x12345678, 3, 'a', 'b', 'c'), ""},
	{"backing format of 15 bytes", ext(extBackingFormat, 15), ""},
	{"backing format of 16 bytes", ext(extBackingFormat, 16), "too large (>=16)"},
	{"bitmaps, bit clear", ext(extBitmaps, 24), ""},
	{"bitmaps of the wrong length", ext(extBitmaps, 23), "bitmaps_ext: Invalid extension length"},
	{"bitmaps, none", all(put64(88, 1), ext(extBitmaps, 24)), "zero bitmaps"},
	{"bitmaps, reserved field", all(put64(88, 1), ext(extBitmaps, 24, 0, 0, 0, 1, 1)), "Reserved field is not zero"},
	{"bitmaps, too many", all(put64(88, 1), ext(extBitmaps, 24, 0, 1, 0, 0)), "exceeding the QEMU supported maximum"},
	{"bitmaps, directory unaligned", all(put64(88, 1), ext(extBitmaps, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 2, 0)), "invalid bitmap directory offset"},
	{"bitmaps, directory too long", all(put64(88, 1), ext(extBitmaps, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 4)), "bitmap directory size"},
	{"crypto without LUKS", ext(extCrypto, 16), "only expected with LUKS"},
	{"crypto of the wrong length", all(put32(32, 2), ext(extCrypto, 15)), "CRYPTO header extension size 15"},
	{"crypto unaligned", all(put32(32, 2), ext(extCrypto, 16, 0, 0, 0, 0, 0, 0, 2)), "is not a multiple of cluster size"},
	{"data file name without the bit", ext(extDataFile, 4, 'd', 'a', 't', 'a'), ""},
	{"feature names of an odd length", ext(extFeatureNames, 50), ""},
}

// differs holds the mutations where this codec refuses what QEMU takes, and why.
var differs = map[string]string{
	// QEMU's rounding overflows to an L1 table of no entries, and the disk has a negative size.
	"size all ones": "Image is too big",
	"size 1<<63":    "Image is too big",
}

// readErrors holds the mutations that QEMU accepts as a header, only to fail with the operating system's error when it
// reads a table.
var readErrors = map[string]bool{"L1 ends beyond the largest offset": true}

func TestHeaderMutations(t *testing.T) {
	dir := t.TempDir()
	good := create(t, filepath.Join(dir, "good.qcow2"), "1G")
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			b := bytes.Clone(good)
			m.mutate(b)
			path := filepath.Join(dir, "mutant.qcow2")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			_, stock := run(t, "qemu-io", "-f", "qcow2", "-r", "-c", "length", path)
			h, ours := ParseHeader(b)
			want := m.refused
			if w, ok := differs[m.name]; ok {
				want = w
			} else if (stock == nil) != (ours == nil) {
				t.Fatalf("QEMU says %v, ParseHeader says %v", stock, ours)
			} else if ours != nil && !readErrors[m.name] && !strings.Contains(stock.Error(), want) {
				t.Errorf("QEMU says %v, want %q", stock, want)
			}
			if (ours != nil) != (want != "") || ours != nil && !strings.Contains(ours.Error(), want) {
				t.Fatalf("ParseHeader says %v, want %q", ours, want)
			}
			if ours == nil {
				checkFixpoint(t, h)
			}
		})
	}
}

// checkFixpoint checks that a parsed header survives being written and read.
func checkFixpoint(t testing.TB, h *Header) {
	t.Helper()
	b, err := h.Marshal()
	if errors.Is(err, ErrHeaderSpace) {
		return
	}
	if err != nil {
		t.Fatalf("Marshal of a header that was accepted: %v", err)
	}
	n, err := HeaderArea(b[:min(len(b), SectorSize)])
	if err != nil || n > h.Layout().ClusterSize() {
		t.Fatalf("HeaderArea = %d, %v", n, err)
	}
	again, err := ParseHeader(b[:min(int64(len(b)), n)])
	if err != nil {
		t.Fatalf("ParseHeader of what Marshal wrote: %v", err)
	}
	want := *h
	want.StaleBitmaps = false // dropped by a rewrite, on purpose
	if d := cmp.Diff(&want, again); d != "" {
		t.Fatalf("a header changes when written and read:\n%s", d)
	}
}

func TestShortFiles(t *testing.T) {
	for _, n := range []int{0, 3, 8, 72, 100, 104} {
		b := make([]byte, n)
		copy(b, "QFI\xfb\x00\x00\x00\x03")
		if n >= 24 {
			put32(OffClusterBits, 16)(b)
		}
		_, err := ParseHeader(b)
		var he *HeaderError
		if n < 4 && !errors.Is(err, ErrNotQCOW2) || n >= 4 && !errors.As(err, &he) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if _, err := HeaderArea(b); n < 72 && err == nil {
			t.Errorf("%d bytes: HeaderArea accepts them", n)
		}
	}
}

func TestUnsupportedError(t *testing.T) {
	_, err := ParseHeader(append([]byte("QFI\xfb"), 0, 0, 0, 9))
	var ue *UnsupportedError
	if !errors.As(err, &ue) || err.Error() != "Unsupported qcow2 version 9" {
		t.Errorf("version 9: %v", err)
	}
	e := &UnsupportedError{Features: []string{"a", "b"}, Mask: 0x60}
	if got, want := e.Error(), "Unsupported qcow2 feature(s): a, b, Unknown incompatible feature: 60"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestNameOfUnknownFeatureIsPrintable(t *testing.T) {
	h := validHeader()
	h.FeatureNames = []FeatureName{{FeatureIncompatible, 9, "evil\x1b[2J"}}
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	put64(OffIncompat, 1<<9)(b)
	_, err = ParseHeader(b)
	if err == nil || strings.ContainsRune(err.Error(), 0x1b) || !strings.Contains(err.Error(), `evil\x1b`) {
		t.Errorf("%v", err)
	}
}

func TestHeaderSpace(t *testing.T) {
	h := validHeader()
	h.ClusterBits = 9
	h.L1Size, h.FeatureNames = 1<<15, nil
	h.RefTableOffset, h.L1Offset = 512, 1024
	room := 512 - HeaderLengthV3 - 8
	h.BackingFile = strings.Repeat("x", room)
	checkFixpoint(t, h)
	if b, err := h.Marshal(); err != nil || len(b) != 512 {
		t.Fatalf("a header that just fits: %d bytes, %v", len(b), err)
	}
	h.BackingFile += "x"
	if _, err := h.Marshal(); !errors.Is(err, ErrHeaderSpace) {
		t.Errorf("a header that does not fit: %v, want ErrHeaderSpace", err)
	}
	h.BackingFile = strings.Repeat("x", MaxBackingName+1)
	if _, err := h.Marshal(); err == nil {
		t.Error("a backing file name of 1024 bytes is accepted")
	}
	h.BackingFile, h.HasBackingFormat, h.BackingFormat = "", true, strings.Repeat("f", MaxBackingFormat+1)
	if _, err := h.Marshal(); err == nil {
		t.Error("a backing format of 16 bytes is accepted")
	}
}

func TestPointerEncoders(t *testing.T) {
	h := validHeader()
	b, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	l1, ref, snap := EncodeL1Pointer(77, 0xa0000), EncodeRefTablePointer(0xb0000, 3), EncodeSnapshotsPointer(5, 0xc0000)
	copy(b[OffL1:], l1[:])
	copy(b[OffRefTable:], ref[:])
	copy(b[OffSnapshots:], snap[:])
	compat, order := EncodeUint64(CompatLazyRefcounts), EncodeUint32(6)
	copy(b[OffCompat:], compat[:])
	copy(b[OffRefcountOrder:], order[:])
	want := *h
	want.L1Size, want.L1Offset, want.RefTableOffset, want.RefTableLen = 77, 0xa0000, 0xb0000, 3
	want.SnapshotCount, want.SnapshotsOffset = 5, 0xc0000
	want.Compat, want.RefcountOrder = CompatLazyRefcounts, 6
	if d := cmp.Diff(&want, parse(t, b)); d != "" {
		t.Errorf("fields written in place:\n%s", d)
	}
}

func validHeader() *Header {
	return &Header{Version: Version3, ClusterBits: 16, Size: 1 << 30, L1Size: 2, L1Offset: 0x30000, RefTableOffset: 0x10000,
		RefTableLen: 1, RefcountOrder: 4, FeatureNames: DefaultFeatureNames()}
}

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checkFixpointRapid(t, drawHeader(t))
	})
}

func checkFixpointRapid(t *rapid.T, h *Header) {
	b, err := h.Marshal()
	if errors.Is(err, ErrHeaderSpace) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	area, err := HeaderArea(b[:min(len(b), SectorSize)])
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseHeader(b[:min(int64(len(b)), area)])
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, again); d != "" {
		t.Fatal(d)
	}
}

// TestHeaderCutShort: what a file lacks of its first cluster counts as zeroes, wherever it ends.
func TestHeaderCutShort(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := drawHeader(t)
		b, err := h.Marshal()
		if errors.Is(err, ErrHeaderSpace) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		b = b[:rapid.IntRange(0, len(b)).Draw(t, "file size")]
		short, shortErr := ParseHeader(b)
		full, fullErr := ParseHeader(zeroExtend(b, 1<<h.ClusterBits))
		if fmt.Sprint(shortErr) != fmt.Sprint(fullErr) || !cmp.Equal(short, full) {
			t.Fatalf("%d bytes: %v, with zeroes behind them: %v\n%s", len(b), shortErr, fullErr, cmp.Diff(full, short))
		}
	})
}

// drawHeader draws a header that is valid in every field.
func drawHeader(t *rapid.T) *Header {
	cb := rapid.Uint32Range(MinClusterBits, MaxClusterBits).Draw(t, "cluster bits")
	aligned := rapid.Custom(func(t *rapid.T) HostOff { return HostOff(rapid.Uint64Range(0, 1<<34).Draw(t, "cluster")) << cb })
	name := rapid.StringMatching(`[a-z/.:]{0,60}`)
	h := &Header{
		Version:         rapid.Uint32Range(2, 3).Draw(t, "version"),
		ClusterBits:     cb,
		L1Size:          rapid.Uint32Range(0, MaxL1Entries).Draw(t, "L1 size"),
		L1Offset:        aligned.Draw(t, "L1"),
		RefTableOffset:  aligned.Draw(t, "reftable"),
		RefTableLen:     rapid.Uint32Range(1, MaxRefTableBytes>>cb).Draw(t, "reftable clusters"),
		SnapshotCount:   rapid.Uint32Range(0, MaxSnapshots).Draw(t, "snapshots"),
		SnapshotsOffset: aligned.Draw(t, "snapshot table"),
		RefcountOrder:   4,
		BackingFile:     name.Draw(t, "backing"),
	}
	if h.HasBackingFormat = rapid.Bool().Draw(t, "has format"); h.HasBackingFormat {
		h.BackingFormat = rapid.SampledFrom([]string{"", "raw", "qcow2"}).Draw(t, "format")
	}
	if h.HasDataFileName = rapid.Bool().Draw(t, "has data file name"); h.HasDataFileName {
		h.DataFileName = name.Draw(t, "data file")
	}
	if rapid.Bool().Draw(t, "LUKS") {
		h.CryptMethod = CryptLUKS
		h.Crypto = &CryptoExt{aligned.Draw(t, "LUKS header"), rapid.Uint64().Draw(t, "LUKS length")}
	}
	for range rapid.IntRange(0, 3).Draw(t, "unknown extensions") {
		e := Extension{Type: rapid.Uint32Range(1, 1000).Draw(t, "type")}
		if n := rapid.IntRange(0, 20).Draw(t, "length"); n > 0 {
			e.Data = rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "data")
		} else {
			e.Data = []byte{}
		}
		h.UnknownExtensions = append(h.UnknownExtensions, e)
	}
	if h.Version == Version3 {
		drawVersion3(t, h)
	}
	h.Size = rapid.Uint64Range(0, min(1<<63-1, uint64(h.L1Size)*uint64(h.Layout().L2Coverage()))).Draw(t, "size")
	return h
}

func drawVersion3(t *rapid.T, h *Header) {
	h.RefcountOrder = rapid.Uint32Range(0, MaxRefcountOrder).Draw(t, "order")
	h.Compat = rapid.Uint64().Draw(t, "compatible")
	h.Autoclear = rapid.Uint64().Draw(t, "autoclear") &^ AutoclearKnown
	h.Incompat = rapid.Uint64Range(0, IncompatKnown).Draw(t, "incompatible")
	if h.ClusterBits < MinExtendedL2ClusterBits {
		h.Incompat &^= IncompatExtL2
	}
	if h.Incompat&IncompatCompression != 0 {
		h.CompressionType = CompressionZstd
	}
	if h.Incompat&IncompatDataFile != 0 && rapid.Bool().Draw(t, "raw") {
		h.Autoclear |= AutoclearRawData
	}
	if rapid.Bool().Draw(t, "names") {
		h.FeatureNames = append(DefaultFeatureNames(), FeatureName{FeatureAutoclear, 63, strings.Repeat("n", featureNameSize)})
	}
	if n := rapid.IntRange(0, 40).Draw(t, "unknown fields"); n > 0 {
		h.UnknownFields = rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "fields")
	}
	if rapid.Bool().Draw(t, "bitmaps") {
		h.Autoclear |= AutoclearBitmaps
		h.Bitmaps = &BitmapsExt{rapid.Uint32Range(1, MaxBitmaps).Draw(t, "count"),
			rapid.Uint64Range(0, MaxBitmapDirectory).Draw(t, "size"), HostOff(7) << h.ClusterBits}
	}
}

func FuzzHeader(f *testing.F) {
	for _, m := range mutations {
		b, err := validHeader().Marshal()
		if err != nil {
			f.Fatal(err)
		}
		b = append(b, make([]byte, 4096-len(b))...)
		m.mutate(b)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseHeaderForCheck(b); err == nil && h.Layout().L2Coverage() <= 0 {
			t.Errorf("a geometry without coverage: %+v", h.Layout())
		}
		h, err := ParseHeader(b)
		if err != nil {
			if h != nil {
				t.Error("a header and an error")
			}
			return
		}
		if n, err := HeaderArea(b[:min(len(b), SectorSize)]); err != nil || n > h.Layout().ClusterSize() {
			t.Fatalf("HeaderArea = %d, %v", n, err)
		} else if int64(len(b)) > n {
			less, err := ParseHeader(b[:n])
			if err != nil || !cmp.Equal(less, h) {
				t.Fatalf("the bytes that HeaderArea asks for give another header: %v\n%s", err, cmp.Diff(h, less))
			}
		}
		checkFixpoint(t, h)
	})
}

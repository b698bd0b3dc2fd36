package format

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func drawSnapshot(t *rapid.T) Snapshot {
	s := Snapshot{
		L1Offset:    HostOff(rapid.Uint64().Draw(t, "L1")),
		L1Size:      rapid.Uint32().Draw(t, "L1 size"),
		ID:          rapid.StringN(0, 20, 20).Draw(t, "ID"),
		Name:        rapid.StringN(0, 300, 300).Draw(t, "name"),
		DateSec:     rapid.Uint32().Draw(t, "sec"),
		DateNsec:    rapid.Uint32().Draw(t, "nsec"),
		VMClockNsec: rapid.Uint64().Draw(t, "clock"),
		VMStateSize: rapid.Uint64().Draw(t, "state"),
		DiskSize:    rapid.Uint64().Draw(t, "size"),
		ICount:      rapid.Uint64().Draw(t, "icount"),
		ExtraSize:   NewSnapshotExtraSize,
	}
	if n := rapid.IntRange(0, 50).Draw(t, "unknown"); n > 0 {
		s.UnknownExtra = rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "extra")
		s.ExtraSize += uint32(n)
	}
	return s
}

func TestSnapshotRoundTrip(t *testing.T) {
	h := validHeader()
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(rapid.Custom(drawSnapshot), 0, 10).Draw(t, "list")
		b, err := MarshalSnapshots(list)
		if err != nil {
			t.Fatal(err)
		}
		got, n, err := ParseSnapshots(append(b, 0xff, 0xff), len(list), h)
		if err != nil || n != len(b) {
			t.Fatalf("%d bytes of %d, %v", n, len(b), err)
		}
		if len(list) == 0 {
			list = []Snapshot{}
		}
		if d := cmp.Diff(list, got); d != "" {
			t.Fatal(d)
		}
	})
}

func TestOldSnapshots(t *testing.T) {
	h := validHeader()
	b, err := MarshalSnapshots([]Snapshot{{VMStateSize: 9, DiskSize: 7 << 20, ICount: 5, ID: "1", Name: "n"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		extra        uint32
		state, disk  uint64
		icount       uint64
		vmStateField uint32
	}{
		{0, 123, 1 << 30, NoICount, 123},
		{8, 9, 1 << 30, NoICount, 123},
		{16, 9, 7 << 20, NoICount, 123},
		{24, 9, 7 << 20, 5, 123},
	} {
		old := bytes.Clone(b[:snapshotHeaderSize+tt.extra])
		old = append(old, "1n"...)
		put32(36, tt.extra)(old)
		put32(32, tt.vmStateField)(old)
		list, n, err := ParseSnapshots(old, 1, h)
		if err != nil || n != len(old) {
			t.Fatalf("extra %d: %d bytes, %v", tt.extra, n, err)
		}
		s := list[0]
		if s.VMStateSize != tt.state || s.DiskSize != tt.disk || s.ICount != tt.icount || s.ID != "1" || s.Name != "n" {
			t.Errorf("extra %d: %+v", tt.extra, s)
		}
	}
}

func TestSnapshotLimits(t *testing.T) {
	h := validHeader()
	if _, _, err := ParseSnapshots(nil, MaxSnapshots+1, h); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("65537 snapshots: %v", err)
	}
	if _, _, err := ParseSnapshots(nil, -1, h); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("-1 snapshots: %v", err)
	}
	if _, _, err := ParseSnapshots(make([]byte, 10), 1, h); err != io.ErrUnexpectedEOF {
		t.Errorf("a table that is cut off: %v", err)
	}
	b := make([]byte, 4096)
	put32(36, MaxSnapshotExtra)(b)
	if _, n, err := ParseSnapshots(b, 1, h); err != nil || n != snapshotHeaderSize+MaxSnapshotExtra {
		t.Errorf("1024 bytes of extra data: %d, %v", n, err)
	}
	put32(36, MaxSnapshotExtra+1)(b)
	if _, _, err := ParseSnapshots(b, 1, h); err == nil || !strings.Contains(err.Error(), "Too much extra metadata") {
		t.Errorf("1025 bytes of extra data: %v", err)
	}
	long := Snapshot{Name: strings.Repeat("x", 65536)}
	if _, err := MarshalSnapshots([]Snapshot{long}); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("a name of 65536 bytes: %v", err)
	}
	if _, err := MarshalSnapshots([]Snapshot{{UnknownExtra: make([]byte, MaxSnapshotExtra)}}); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("extra data of 1048 bytes: %v", err)
	}
	if _, err := MarshalSnapshots(make([]Snapshot, MaxSnapshots+1)); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("65537 snapshots: %v", err)
	}
	long.Name = long.Name[1:]
	many := make([]Snapshot, MaxSnapshotTable/65536+1)
	for i := range many {
		many[i] = long
	}
	if _, err := MarshalSnapshots(many); !errors.Is(err, ErrSnapshotTable) {
		t.Errorf("a table of more than 64 MiB: %v", err)
	}
	if b, err := MarshalSnapshots([]Snapshot{{VMStateSize: 1 << 32}}); err != nil || !bytes.Equal(b[32:36], make([]byte, 4)) {
		t.Errorf("a VM state of 4 GiB: %v, % x", err, b[32:36])
	}
}

func FuzzSnapshots(f *testing.F) {
	b, err := MarshalSnapshots([]Snapshot{{ID: "1", Name: "a"}, {ID: "2", Name: "b", UnknownExtra: []byte("more")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, uint16(2))
	f.Add(b[:70], uint16(2))
	f.Add(make([]byte, 80), uint16(9))
	f.Fuzz(func(t *testing.T, b []byte, n uint16) {
		h := validHeader()
		list, used, err := ParseSnapshots(b, int(n), h)
		if used > len(b) {
			t.Fatalf("%d bytes of %d", used, len(b))
		}
		if err != nil {
			return
		}
		if len(list) != int(n) {
			t.Fatalf("%d snapshots of %d", len(list), n)
		}
		out, err := MarshalSnapshots(list)
		if err != nil {
			return // the extra data grew beyond the limit
		}
		again, _, err := ParseSnapshots(out, int(n), h)
		if err != nil {
			t.Fatal(err)
		}
		for i := range list { // a rewrite stores what the old entry left out
			list[i].ExtraSize = again[i].ExtraSize
		}
		if d := cmp.Diff(list, again); d != "" {
			t.Fatal(d)
		}
	})
}

func bitmapHeader(count int) *Header {
	h := validHeader()
	h.Autoclear |= AutoclearBitmaps
	h.Bitmaps = &BitmapsExt{Count: uint32(count)}
	return h
}

func TestBitmapDirectoryRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []Bitmap
		for i := range rapid.IntRange(1, 8).Draw(t, "count") {
			list = append(list, Bitmap{
				TableOffset:     HostOff(rapid.Uint64Range(1, 1<<40).Draw(t, "table")) << 16,
				TableSize:       rapid.Uint32Range(4, MaxBitmapBytes>>16).Draw(t, "entries"),
				Flags:           BitmapFlags(rapid.Uint32Range(0, 3).Draw(t, "flags")),
				GranularityBits: uint8(rapid.IntRange(MinBitmapGranularityBits, MaxBitmapGranularityBits).Draw(t, "granularity")),
				Name:            string(rune('a'+i)) + rapid.StringN(0, 100, 1000).Draw(t, "name"),
			})
		}
		h := bitmapHeader(len(list))
		b, err := MarshalBitmapDirectory(list, h)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseBitmapDirectory(b, h)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(list, got); d != "" {
			t.Fatal(d)
		}
	})
}

func TestBitmapDirectoryFaults(t *testing.T) {
	good := Bitmap{TableOffset: 0x50000, TableSize: 1, Flags: BitmapAuto, GranularityBits: 16, Name: "b"}
	tests := []struct {
		name   string
		mutate func(m *Bitmap)
	}{
		{"no table", func(m *Bitmap) { m.TableOffset = 0 }},
		{"unaligned table", func(m *Bitmap) { m.TableOffset = 0x50200 }},
		{"empty table", func(m *Bitmap) { m.TableSize = 0 }},
		{"table too large", func(m *Bitmap) { m.TableSize = MaxBitmapBytes>>16 + 1 }},
		{"granularity too fine", func(m *Bitmap) { m.GranularityBits = 8 }},
		{"granularity too coarse", func(m *Bitmap) { m.GranularityBits = 32 }},
		{"unknown flag", func(m *Bitmap) { m.Flags = 8 }},
		{"extra data flag", func(m *Bitmap) { m.Flags = BitmapExtraCompatible }},
		{"no name", func(m *Bitmap) { m.Name = "" }},
		{"name too long", func(m *Bitmap) { m.Name = strings.Repeat("n", MaxBitmapName+1) }},
		{"shorter than the disk", func(m *Bitmap) { m.GranularityBits = 9; m.TableSize = 1 }},
	}
	h := bitmapHeader(1)
	h.Size = 512 << 20
	for _, tt := range tests {
		m := good
		tt.mutate(&m)
		if _, err := MarshalBitmapDirectory([]Bitmap{m}, h); !errors.Is(err, ErrBitmapDirectory) {
			t.Errorf("%s: Marshal says %v", tt.name, err)
		}
	}
	b, err := MarshalBitmapDirectory([]Bitmap{good}, h)
	if err != nil {
		t.Fatal(err)
	}
	faults := map[string]func([]byte) []byte{
		"type":       func(b []byte) []byte { b[16] = 2; return b },
		"extra":      func(b []byte) []byte { b[23] = 8; return append(b, 0, 0, 0, 0, 0, 0, 0, 0) },
		"extra huge": func(b []byte) []byte { put32(20, 1<<32-1)(b); return b },
		"cut off":    func(b []byte) []byte { return b[:len(b)-1] },
		"head only":  func(b []byte) []byte { return b[:20] },
		"empty":      func(b []byte) []byte { return nil },
		"two":        func(b []byte) []byte { return append(b, b...) },
		"unaligned":  func(b []byte) []byte { b[6] = 2; return b },
	}
	for name, fault := range faults {
		if _, err := ParseBitmapDirectory(fault(bytes.Clone(b)), h); !errors.Is(err, ErrBitmapDirectory) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseBitmapDirectory(append(bytes.Clone(b), b...), bitmapHeader(2)); !errors.Is(err, ErrBitmapDirectory) {
		t.Errorf("two bitmaps of one name: %v", err)
	}
	if _, err := ParseBitmapDirectory(b, bitmapHeader(2)); !errors.Is(err, ErrBitmapDirectory) {
		t.Errorf("less bitmaps than promised: %v", err)
	}
	if _, err := ParseBitmapDirectory(b, validHeader()); !errors.Is(err, ErrBitmapDirectory) {
		t.Errorf("no bitmaps in the header: %v", err)
	}
}

func TestBitmapSizes(t *testing.T) {
	l := Layout{ClusterBits: 16, Version: Version3}
	tests := []struct {
		disk    int64
		bits    uint8
		size    int64
		entries int64
	}{
		{0, 16, 0, 0}, {1, 16, 1, 1}, {65536, 16, 1, 1}, {8 << 16, 16, 1, 1}, {8<<16 + 1, 16, 2, 1}, {1 << 30, 9, 262144, 4},
		{1<<30 + 1, 9, 262145, 5}, {1<<63 - 1, 31, 1 << 29, 8192},
	}
	for _, tt := range tests {
		if got := BitmapDataSize(tt.disk, tt.bits); got != tt.size {
			t.Errorf("BitmapDataSize(%d, %d) = %d, want %d", tt.disk, tt.bits, got, tt.size)
		}
		if got := l.BitmapTableEntries(tt.disk, tt.bits); got != tt.entries {
			t.Errorf("BitmapTableEntries(%d, %d) = %d, want %d", tt.disk, tt.bits, got, tt.entries)
		}
	}
	b := []byte{0xff, 0xff}
	TrimBitmap(b, 11<<16, 16)
	if b[0] != 0xff || b[1] != 0x07 {
		t.Errorf("TrimBitmap leaves % x", b)
	}
	full := []byte{0xff}
	TrimBitmap(full, 8<<16, 16)
	if full[0] != 0xff {
		t.Errorf("TrimBitmap of whole bytes leaves % x", full)
	}
}

func TestBitmapEntries(t *testing.T) {
	l := Layout{ClusterBits: 16}
	for e, want := range map[BitmapEntry]bool{0: true, 1: true, 0x50000: true, 0x50001: false, 0x50200: false, 2: false, 1 << 56: false} {
		if got := e.Valid(l); got != want {
			t.Errorf("entry %#x valid: %v, want %v", uint64(e), got, want)
		}
	}
	if !BitmapEntryOnes.AllOnes() || BitmapEntryZeroes.AllOnes() {
		t.Error("all ones and all zeroes are not told apart")
	}
}

func FuzzBitmapDir(f *testing.F) {
	b, err := MarshalBitmapDirectory([]Bitmap{{TableOffset: 0x50000, TableSize: 1, GranularityBits: 16, Name: "bitmap"},
		{TableOffset: 0x60000, TableSize: 2, GranularityBits: 20, Name: "c"}}, bitmapHeader(2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, uint16(2))
	f.Add(b[:40], uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, n uint16) {
		h := bitmapHeader(int(n))
		list, err := ParseBitmapDirectory(b, h)
		if err != nil {
			return
		}
		out, err := MarshalBitmapDirectory(list, h)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseBitmapDirectory(out, h)
		if err != nil || !cmp.Equal(list, again) {
			t.Fatalf("%v\n%s", err, cmp.Diff(list, again))
		}
	})
}

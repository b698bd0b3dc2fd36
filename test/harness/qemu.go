package harness

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

// Span is one entry of `qemu-img map --output=json` or of `drover map --output=json`.
type Span struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"`
}

func (s Span) String() string {
	at := "-"
	if s.Offset != nil {
		at = fmt.Sprintf("%#x", *s.Offset)
	}
	return fmt.Sprintf("[%#x, +%#x) depth %d present %t zero %t data %t at %s",
		s.Start, s.Length, s.Depth, s.Present, s.Zero, s.Data, at)
}

func (s Span) continues(prev Span) bool {
	if prev.Start+prev.Length != s.Start || prev.Depth != s.Depth || prev.Present != s.Present || prev.Zero != s.Zero ||
		prev.Data != s.Data || (prev.Offset == nil) != (s.Offset == nil) {
		return false
	}
	return s.Offset == nil || *prev.Offset+prev.Length == *s.Offset
}

// ParseMap reads a JSON map and joins neighbours in the same state: how finely a tool cuts its map is its own affair.
//
// Of data that has a place in the image's file it forgets whether it is known to be zero. QEMU looks for holes below
// allocated clusters only in files that it guesses to be preallocated, by a rule of its own that depends on how much space
// the host's file system happens to use.
func ParseMap(t testing.TB, data []byte) []Span {
	t.Helper()
	var raw []Span
	if err := json.Unmarshal(data, &raw); err != nil {
		t.Fatalf("parsing a map: %v\n%s", err, data)
	}
	var spans []Span
	for _, s := range raw {
		if s.Data && s.Offset != nil {
			s.Zero = false
		}
		if n := len(spans); n > 0 && s.continues(spans[n-1]) {
			spans[n-1].Length += s.Length
			continue
		}
		spans = append(spans, s)
	}
	return spans
}

// SameMap fails the test unless drover and qemu-img see the same map.
func SameMap(t testing.TB, image string) {
	t.Helper()
	want := ParseMap(t, Must(t, "qemu-img", "map", "-f", "qcow2", "--output=json", image))
	got := ParseMap(t, MustDrover(t, "map", "-f", "qcow2", "--output=json", image))
	for i := range max(len(want), len(got)) {
		switch {
		case i >= len(got):
			t.Errorf("map: drover lacks %v", want[i])
		case i >= len(want):
			t.Errorf("map: qemu-img lacks %v", got[i])
		case !reflect.DeepEqual(want[i], got[i]):
			t.Errorf("map entry %d:\n  drover   %v\n  qemu-img %v", i, got[i], want[i])
		default:
			continue
		}
		break
	}
}

// parseObject reads one JSON object.
func parseObject(t testing.TB, data []byte) map[string]any {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal(data, &o); err != nil {
		t.Fatalf("parsing JSON: %v\n%s", err, data)
	}
	return o
}

// SameCheck fails the test unless qemu-img finds nothing wrong with the image, and drover says the very same.
func SameCheck(t testing.TB, image string) {
	t.Helper()
	want := parseObject(t, Must(t, "qemu-img", "check", "-f", "qcow2", "--output=json", image))
	got := parseObject(t, MustDrover(t, "check", "-f", "qcow2", "--output=json", image))
	diffObjects(t, "check", got, want)
}

// SameInfo fails the test unless drover and qemu-img describe the image alike.
func SameInfo(t testing.TB, image string) {
	t.Helper()
	want := parseObject(t, Must(t, "qemu-img", "info", "-f", "qcow2", "--output=json", image))
	got := parseObject(t, MustDrover(t, "info", "-f", "qcow2", "--output=json", image))
	// The node graph is newer than the oldest qemu-img that the tests run with.
	delete(want, "children")
	delete(got, "children")
	diffObjects(t, "info", got, want)
}

func diffObjects(t testing.TB, what string, got, want map[string]any) {
	t.Helper()
	for key := range union(got, want) {
		if !reflect.DeepEqual(got[key], want[key]) {
			t.Errorf("%s: %q is %v, qemu-img says %v", what, key, got[key], want[key])
		}
	}
}

func union(a, b map[string]any) map[string]bool {
	keys := make(map[string]bool)
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	return keys
}

// Raw returns the content of an image as stock QEMU reads it.
func Raw(t testing.TB, image, format string) []byte {
	t.Helper()
	return convert(t, "-f", format, image)
}

// RawSnapshot returns the content of an internal snapshot as stock QEMU reads it.
func RawSnapshot(t testing.TB, image, name string) []byte {
	t.Helper()
	return convert(t, "-f", "qcow2", "-l", "snapshot.name="+name, image)
}

func convert(t testing.TB, source ...string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	Must(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, source...), raw)...)
	data, err := os.ReadFile(raw)
	OK(t, err)
	OK(t, os.Remove(raw))
	return data
}

// Copy returns the content of an export as nbdcopy reads it over four connections.
func Copy(t testing.TB, uri string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "copy")
	Must(t, "nbdcopy", "--connections=4", uri, raw)
	data, err := os.ReadFile(raw)
	OK(t, err)
	OK(t, os.Remove(raw))
	return data
}

// CopyFile copies a file with all its bytes.
func CopyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	OK(t, err)
	OK(t, os.WriteFile(to, data, 0o644))
}

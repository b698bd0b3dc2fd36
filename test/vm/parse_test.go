package vm

import (
	"bytes"
	"testing"
)

// TestResults reads what a guest says; a result must not hide the next.
func TestResults(t *testing.T) {
	got := parseResults("x\nRESULT a ok\nRESULT b FAIL exit 1: dd\nRESULT c ok \nRESULT d FAIL\n")
	want := []Result{{"a", true, ""}, {"b", false, "exit 1: dd"}, {"c", true, ""}, {"d", false, ""}}
	if len(got) != len(want) {
		t.Fatalf("%+v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
}

// TestArchive packs a file: the folders come first, and everything stands at multiples of four bytes.
func TestArchive(t *testing.T) {
	var out bytes.Buffer
	a := newArchive(&out)
	a.file("a/b/c", []byte("hello"))
	a.file("a/d", []byte("world"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	var names []string
	for p := out.Bytes(); len(p) > 0; {
		if len(p) < 110 || string(p[:6]) != "070701" {
			t.Fatalf("no header at %d of %d", out.Len()-len(p), out.Len())
		}
		number := func(i int) int {
			n := 0
			for _, c := range p[6+8*i:][:8] {
				n = n<<4 | bytes.IndexByte([]byte("0123456789ABCDEF"), c)
			}
			return n
		}
		size, name := number(6), number(11)
		names = append(names, string(p[110:][:name-1]))
		skip := (110 + name + 3) &^ 3
		p = p[min(len(p), skip+(size+3)&^3):]
	}
	want := []string{"a", "a/b", "a/b/c", "a/d", "TRAILER!!!"}
	if len(names) != len(want) {
		t.Fatalf("%q", names)
	}
	for i := range want {
		if names[i] != want[i] {
			t.Errorf("%q, want %q", names, want)
		}
	}
}

package filter

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

func quiet(string) {}

func TestRules(t *testing.T) {
	list, err := parseConfig(`
# comment
[inject-error]
event = "write_aio"
errno = "28"
once = "on"

[set-state "2"]
event = "read_aio"
state = "1"
new_state = "2"

[inject-error]
event = "read_aio"
state = "2"
sector = "8"
`)
	if err != nil {
		t.Fatal(err)
	}
	r := newRules(list, quiet)
	expect := func(what string, want error, got error) {
		t.Helper()
		if want == nil && got != nil || !errors.Is(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	expect("before any event", nil, r.check(ioWrite, 0, 512))
	r.Event(storage.EventWriteAIO)
	expect("armed: block status", nil, r.check(ioStatus, 0, 512))
	expect("armed", syscall.ENOSPC, r.check(ioWrite, 0, 512))
	expect("only once", nil, r.check(ioWrite, 0, 512))
	r.Event(storage.EventWriteAIO)
	expect("gone for good", nil, r.check(ioWrite, 0, 512))
	r.Event(storage.EventReadAIO) // changes the state
	expect("in the state before", nil, r.check(ioRead, 4096, 512))
	r.Event(storage.EventReadAIO)
	expect("in the second state, elsewhere", nil, r.check(ioRead, 0, 4096))
	expect("in the second state", syscall.EIO, r.check(ioRead, 0, 4097))
	expect("again", syscall.EIO, r.check(ioRead, 4096, 512))
	expect("without a place", nil, r.check(ioFlush, 0, 0))
}

func TestBreakpoints(t *testing.T) {
	var said []string
	r := newRules(nil, func(s string) { said = append(said, s) })
	if err := r.Break("no such event", "a"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("unknown event: %v", err)
	}
	if err := r.Break("write_aio", "a"); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { r.Event(storage.EventWriteAIO); close(done) }()
	if err := r.WaitBreak(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	r.Event(storage.EventWriteAIO) // a breakpoint holds one request
	if err := r.Resume("b"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("resuming what does not exist: %v", err)
	}
	if err := r.Resume("a"); err != nil {
		t.Error(err)
	}
	<-done
	if want := []string{"blkdebug: Suspended request 'a'", "blkdebug: Resuming request 'a'"}; !slices.Equal(said, want) {
		t.Errorf("said %q", said)
	}
	if err := r.Break("write_aio", "c"); err != nil {
		t.Fatal(err)
	}
	if err := r.RemoveBreak("c"); err != nil {
		t.Error(err)
	}
	r.Event(storage.EventWriteAIO) // holds nobody any more
	if err := r.RemoveBreak("c"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("removing twice: %v", err)
	}
	if err := r.Break("read_aio", "d"); err != nil {
		t.Fatal(err)
	}
	done = make(chan struct{})
	go func() { r.Event(storage.EventReadAIO); close(done) }()
	if err := r.WaitBreak(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	r.Release()
	<-done
}

func TestBadRules(t *testing.T) {
	for text, want := range map[string]string{
		"[inject-error]\nerrno = \"5\"":                        "Missing event name",
		"[inject-error]\nevent = \"foo\"":                      "Invalid event name",
		"[inject-error]\nevent = \"read_aio\"\nfoo = \"1\"":    "Invalid parameter 'foo'",
		"[inject-error]\nevent = \"read_aio\"\nerrno = \"x\"":  "expects a number",
		"[inject-error]\nevent = \"read_aio\"\nonce = \"x\"":   "expects 'on' or 'off'",
		"[inject-error]\nevent = \"read_aio\"\niotype = \"x\"": "Invalid iotype value",
		"[other]":     "no option group 'other'",
		"event = x":   "line 1",
		"\nnonsense":  "line 2",
		"[set-state]": "Missing event name",
	} {
		if _, err := parseConfig(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	for key, want := range map[string]string{"event": "is unexpected", "1.event": "inject-error.0' is missing", "0.event": "invalid parameter value"} {
		if _, err := takeRules("inject-error", block.Options{key: "x"}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", key, err, want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n[set-state]\nevent = \"none\"\nnew_state = \"2\"")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseConfig(text)
		if err != nil {
			return
		}
		r := newRules(list, quiet)
		for e := storage.EventNone; e.String() != "unknown event"; e++ {
			r.Event(e)
			_ = r.check(ioWrite, 0, 512) // it may fail, but must return
		}
	})
}

func TestEventNames(t *testing.T) {
	for e := storage.EventNone; e.String() != "unknown event"; e++ {
		if got, ok := storage.ParseEvent(e.String()); !ok || got != e {
			t.Errorf("%v is parsed as %v", e, got)
		}
	}
}

// TestThrottle has a clock of its own: what requests wait is what the limits say.
func TestThrottle(t *testing.T) {
	for name, c := range map[string]struct {
		props map[string]string
		want  time.Duration // that the fifth of five requests of 100 bytes at one moment waits
	}{
		"none":            {nil, 0},
		"bytes":           {map[string]string{"x-bps-total": "1000"}, 300 * time.Millisecond}, // a tenth of a second is free
		"bytes written":   {map[string]string{"x-bps-write": "1000"}, 300 * time.Millisecond},
		"bytes read":      {map[string]string{"x-bps-read": "1000"}, 0},
		"burst":           {map[string]string{"x-bps-total": "100", "x-bps-total-max": "300"}, time.Second},
		"long burst":      {map[string]string{"limits.bps-total": "100", "limits.bps-total-max": "200", "limits.bps-total-max-length": "2"}, 0},
		"requests":        {map[string]string{"x-iops-total": "10"}, 300 * time.Millisecond},
		"size of request": {map[string]string{"x-iops-total": "10", "x-iops-size": "50"}, 700 * time.Millisecond},
	} {
		g, err := NewThrottleGroup(c.props)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		now, waited := time.Unix(1000, 0), time.Duration(0)
		g.now = func() time.Time { return now }
		g.wait = func(_ context.Context, d time.Duration) error { waited = d; return nil }
		for range 5 {
			waited = 0
			if err := g.pass(t.Context(), writing, 100); err != nil {
				t.Fatal(err)
			}
		}
		if d := waited - c.want; d < -time.Millisecond || d > time.Millisecond {
			t.Errorf("%s: waits %v, want %v", name, waited, c.want)
		}
		now, waited = now.Add(time.Hour), 0
		if err := g.pass(t.Context(), writing, 100); err != nil || waited != 0 {
			t.Errorf("%s: waits %v after an hour (%v)", name, waited, err)
		}
	}
	for key, value := range map[string]string{"x-bps-total": "x", "foo": "1", "x-foo": "1", "x-iops-size": "512", "x-bps-total-max": "5", "x-iops-read": "-1"} {
		if _, err := NewThrottleGroup(map[string]string{key: value}); err == nil {
			t.Errorf("%s=%s is accepted", key, value)
		}
	}
}

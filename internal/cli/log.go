package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
)

// plainHandler logs a message as every other message of the program looks, what belongs to it behind: servers that run in
// the foreground are read by people, and a service manager adds the time.
type plainHandler struct {
	mu     *sync.Mutex // messages of several goroutines must not mix
	out    io.Writer
	level  slog.Leveler
	suffix string
	prefix string // of names
}

func newPlainHandler(out io.Writer, level slog.Leveler) slog.Handler {
	return &plainHandler{mu: new(sync.Mutex), out: out, level: level}
}

// Enabled implements slog.Handler.
func (h *plainHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

// Handle implements slog.Handler.
func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s%s", program, r.Message, h.suffix)
	r.Attrs(func(a slog.Attr) bool {
		writeAttr(&b, h.prefix, a)
		return true
	})
	b.WriteByte('\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.out, b.String())
	return err
}

// WithAttrs implements slog.Handler.
func (h *plainHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	for _, a := range attrs {
		writeAttr(&b, h.prefix, a)
	}
	c := *h
	c.suffix += b.String()
	return &c
}

// WithGroup implements slog.Handler.
func (h *plainHandler) WithGroup(name string) slog.Handler {
	c := *h
	if name != "" {
		c.prefix += name + "."
	}
	return &c
}

func writeAttr(b *strings.Builder, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if a.Equal(slog.Attr{}) || v.Kind() == slog.KindString && v.String() == "" {
		return
	}
	if v.Kind() == slog.KindGroup {
		for _, in := range v.Group() {
			writeAttr(b, prefix+a.Key+".", in)
		}
		return
	}
	text := v.String()
	if strings.ContainsAny(text, " =\"\n\t") || strconv.Quote(text) != `"`+text+`"` {
		text = strconv.Quote(text)
	}
	fmt.Fprintf(b, " %s%s=%s", prefix, a.Key, text)
}

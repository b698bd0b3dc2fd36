package filter

//lint:file-ignore ST1005 the errors about options say what QEMU says of them

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// ioType is a kind of request that a rule can fail.
type ioType uint8

const (
	ioRead ioType = 1 << iota
	ioWrite
	ioWriteZeroes
	ioDiscard
	ioFlush
	ioStatus

	ioAny = ioRead | ioWrite | ioWriteZeroes | ioDiscard | ioFlush // unless a rule says more
)

var ioTypes = map[string]ioType{
	"read": ioRead, "write": ioWrite, "write-zeroes": ioWriteZeroes, "discard": ioDiscard, "flush": ioFlush, "block-status": ioStatus,
}

// action is what a rule does at its event.
type action uint8

const (
	injectError action = iota
	setState
	suspend
)

// rule is one thing that is to happen at an event.
type rule struct {
	do    action
	event storage.Event
	state int // in which it holds; 0 for all

	errno  syscall.Errno
	sector int64 // -1 for any
	once   bool
	types  ioType

	next int // the new state
	tag  string
}

// held is a request that has stopped at a breakpoint.
type held struct {
	tag    string
	resume chan struct{}
}

// rules are the rules of a blkdebug node and what has become of them. It is a block.Breaker.
type rules struct {
	mu     sync.Mutex
	all    []*rule
	active []*rule // errors that the last events have armed, the newest first
	state  int
	held   []held
	change chan struct{} // closed when a request has stopped
	print  func(string)
}

func newRules(list []*rule, print func(string)) *rules {
	r := &rules{all: list, state: 1, change: make(chan struct{}), print: print}
	r.Event(storage.EventNone)
	return r
}

// Event implements storage.Eventer.
func (r *rules) Event(e storage.Event) {
	var wait []chan struct{}
	r.mu.Lock()
	next, armed := r.state, false
	for _, x := range slices.Clone(r.all) {
		if x.event != e || x.state != 0 && x.state != r.state {
			continue
		}
		switch x.do {
		case injectError:
			if !armed {
				r.active, armed = nil, true
			}
			r.active = slices.Insert(r.active, 0, x)
		case setState:
			next = x.next
		case suspend:
			r.drop(x)
			h := held{x.tag, make(chan struct{})}
			r.held = append(r.held, h)
			wait = append(wait, h.resume)
			r.print(fmt.Sprintf("blkdebug: Suspended request '%s'", x.tag))
			close(r.change)
			r.change = make(chan struct{})
		}
	}
	r.state = next
	r.mu.Unlock()
	for _, w := range wait {
		<-w
	}
}

func (r *rules) drop(x *rule) {
	r.all = slices.DeleteFunc(r.all, func(y *rule) bool { return x == y })
}

// check returns the error that a request is to fail with.
func (r *rules) check(t ioType, off, n int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, x := range r.active {
		at := x.sector * storage.SectorSize
		if x.types&t == 0 || x.sector >= 0 && (at < off || at >= off+n) {
			continue
		}
		if x.errno == 0 {
			return nil
		}
		if x.once {
			r.active = slices.Delete(r.active, i, i+1)
			r.drop(x)
		}
		return fmt.Errorf("blkdebug: %w", x.errno)
	}
	return nil
}

// Break implements block.Breaker.
func (r *rules) Break(event, tag string) error {
	e, ok := storage.ParseEvent(event)
	if !ok {
		return syscall.ENOENT
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, &rule{do: suspend, event: e, tag: tag})
	return nil
}

// RemoveBreak implements block.Breaker.
func (r *rules) RemoveBreak(tag string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.all)
	r.all = slices.DeleteFunc(r.all, func(x *rule) bool { return x.do == suspend && x.tag == tag })
	if !r.resume(tag, true) && len(r.all) == n {
		return syscall.ENOENT
	}
	return nil
}

// Resume implements block.Breaker.
func (r *rules) Resume(tag string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.resume(tag, false) {
		return syscall.ENOENT
	}
	return nil
}

// resume lets the request that stopped last go on, or all of the tag. It reports whether there was one.
func (r *rules) resume(tag string, all bool) bool {
	found := false
	for i := len(r.held) - 1; i >= 0; i-- {
		if r.held[i].tag != tag {
			continue
		}
		r.print(fmt.Sprintf("blkdebug: Resuming request '%s'", tag))
		close(r.held[i].resume)
		r.held = slices.Delete(r.held, i, i+1)
		if found = true; !all {
			break
		}
	}
	return found
}

// WaitBreak implements block.Breaker.
func (r *rules) WaitBreak(ctx context.Context, tag string) error {
	for {
		r.mu.Lock()
		stopped := slices.ContainsFunc(r.held, func(h held) bool { return h.tag == tag })
		change := r.change
		r.mu.Unlock()
		if stopped {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Release implements block.Breaker.
func (r *rules) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = slices.DeleteFunc(r.all, func(x *rule) bool { return x.do == suspend })
	for _, h := range r.held {
		close(h.resume)
	}
	r.held = nil
}

// maxConfig bounds a file of rules.
const maxConfig = 1 << 20

// readConfig reads rules from a file of sections [inject-error] and [set-state].
func readConfig(name string) ([]*rule, error) {
	f, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			return nil, fmt.Errorf("Could not read blkdebug config file: %s", capital(errno.Error()))
		}
		return nil, fmt.Errorf("Could not read blkdebug config file: %w", err)
	}
	text := make([]byte, maxConfig+1)
	n, err := f.ReadAt(text, 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("Could not read blkdebug config file: %w", err)
	}
	if n > maxConfig {
		return nil, errors.New("Could not read blkdebug config file: File too large")
	}
	return parseConfig(string(text[:n]))
}

// parseConfig reads the text of such a file.
func parseConfig(text string) ([]*rule, error) {
	var list []*rule
	section, props := "", map[string]string{}
	end := func() error {
		if section == "" {
			return nil
		}
		x, err := newRule(section, props)
		if err == nil {
			list = append(list, x)
		}
		return err
	}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[' && strings.HasSuffix(line, "]"):
			if err := end(); err != nil {
				return nil, err
			}
			section, _, _ = strings.Cut(strings.Trim(line, "[]"), " ")
			props = map[string]string{}
			if section != "inject-error" && section != "set-state" {
				return nil, fmt.Errorf("There is no option group '%s'", section)
			}
		default:
			name, value, ok := strings.Cut(line, "=")
			value = strings.TrimSpace(value)
			if !ok || section == "" || len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
				return nil, fmt.Errorf("Could not parse blkdebug config file: parse error in line %d", i+1)
			}
			props[strings.TrimSpace(name)] = value[1 : len(value)-1]
		}
	}
	return list, end()
}

// takeRules takes the rules out of a node's options: inject-error.N.event and so on.
func takeRules(section string, o block.Options) ([]*rule, error) {
	byIndex := make(map[string]map[string]string)
	for _, key := range slices.Sorted(maps.Keys(o)) {
		value := o[key]
		index, name, ok := strings.Cut(key, ".")
		if !ok {
			return nil, fmt.Errorf("Parameter '%s.%s' is unexpected", section, key)
		}
		if byIndex[index] == nil {
			byIndex[index] = make(map[string]string)
		}
		byIndex[index][name] = value
	}
	var list []*rule
	for i := range len(byIndex) {
		props, ok := byIndex[strconv.Itoa(i)]
		if !ok {
			return nil, fmt.Errorf("Parameter '%s.%d' is missing", section, i)
		}
		if name, ok := props["event"]; ok {
			if _, known := storage.ParseEvent(name); !known {
				return nil, fmt.Errorf("invalid parameter value: %s", name)
			}
		}
		x, err := newRule(section, props)
		if err != nil {
			return nil, err
		}
		list = append(list, x)
	}
	return list, nil
}

// newRule makes a rule of its properties.
func newRule(section string, props map[string]string) (*rule, error) {
	x := &rule{do: injectError, errno: syscall.EIO, sector: -1, types: ioAny}
	known := []string{"event", "state", "errno", "sector", "once", "immediately", "iotype"}
	if section == "set-state" {
		x.do, known = setState, []string{"event", "state", "new_state"}
	}
	for name := range props {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("Invalid parameter '%s'", name)
		}
	}
	name, ok := props["event"]
	if !ok {
		return nil, errors.New("Missing event name for rule")
	}
	if x.event, ok = storage.ParseEvent(name); !ok {
		return nil, fmt.Errorf("Invalid event name \"%s\"", name)
	}
	var err error
	number := func(name string, bits int) int64 {
		text, ok := props[name]
		if !ok || err != nil {
			return 0
		}
		n, perr := strconv.ParseInt(text, 0, bits)
		if perr != nil {
			err = fmt.Errorf("Parameter '%s' expects a number", name)
		}
		return n
	}
	x.state, x.next = int(number("state", 32)), int(number("new_state", 32))
	if _, ok := props["errno"]; ok {
		x.errno = syscall.Errno(number("errno", 32))
	}
	if _, ok := props["sector"]; ok {
		x.sector = number("sector", 54)
	}
	if err != nil {
		return nil, err
	}
	for name, to := range map[string]*bool{"once": &x.once, "immediately": new(bool)} {
		switch props[name] {
		case "":
		case "on", "yes", "true", "y":
			*to = true
		case "off", "no", "false", "n":
		default:
			return nil, fmt.Errorf("Parameter '%s' expects 'on' or 'off'", name)
		}
	}
	if text, ok := props["iotype"]; ok {
		if x.types, ok = ioTypes[text]; !ok {
			return nil, fmt.Errorf("Invalid iotype value: invalid parameter value: %s", text)
		}
	}
	return x, nil
}

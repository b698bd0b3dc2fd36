package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// shelf is a Provider whose offers are devices that count how often they are open.
type shelf struct {
	mu    sync.Mutex
	names []string
	open  map[string]int
	ever  int
	allow func(nbd.Peer) bool
	fail  error
}

type shelved struct {
	*nbdtest.Device
	close func()
}

func (s shelved) Close() error { s.close(); return nil }

func (p *shelf) Offers() []nbd.Offer {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []nbd.Offer
	for _, n := range p.names {
		list = append(list, p.offer(n))
	}
	return list
}

func (p *shelf) Find(name string) (nbd.Offer, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.offer(name), slices.Contains(p.names, name)
}

func (p *shelf) offer(name string) nbd.Offer {
	return nbd.Offer{Name: name, Description: "about " + name, Allow: p.allow, Open: func(context.Context) (block.Device, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.fail != nil {
			return nil, p.fail
		}
		p.open[name]++
		p.ever++
		return shelved{nbdtest.NewDevice(1 << 20), func() { p.count(name, -1) }}, nil
	}}
}

func (p *shelf) count(name string, by int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open[name] += by
	return p.open[name]
}

func listNames(t *testing.T, c *nbdtest.Client) []string {
	t.Helper()
	replies, err := c.Must(nbdtest.OptList, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range replies {
		if r.Type == nbdtest.RepServer {
			names = append(names, string(r.Data[4:]))
		}
	}
	return names
}

func TestProvider(t *testing.T) {
	noLeaks(t)
	p := &shelf{names: []string{"b", "a", "live"}, open: make(map[string]int)}
	ended := make(chan struct{}, 100)
	var failed []string
	s := start(t, nbd.Options{Provider: p, Observer: nbd.Observer{
		Disconnected: func(nbd.Conn, nbd.Stats, error) { ended <- struct{}{} },
		OpenFailed:   func(_ nbd.Peer, name string, err error) { failed = append(failed, fmt.Sprint(name, ": ", err)) },
	}}, nbd.Export{Name: "live", Device: nbdtest.NewDevice(4096)})

	c := s.dial()
	if got := listNames(t, c); !slices.Equal(got, []string{"aabout a", "babout b", "live"}) {
		t.Errorf("the list is %q", got)
	}
	if err := c.Info("missing"); err == nil {
		t.Error("there is an export that nobody offers")
	}
	for _, name := range []string{"a", "b", "a", "live"} {
		if err := c.Info(name); err != nil {
			t.Error(err)
		}
	}
	if a, b := p.count("a", 0), p.count("b", 0); a != 1 || b != 0 {
		t.Errorf("a handshake has %d and %d devices open, not the last one alone", a, b)
	}
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	if ids, err := c.Meta(nbdtest.OptSetMeta, "b", "base:allocation"); err != nil || len(ids) != 1 {
		t.Fatalf("contexts of b: %v %v", ids, err)
	}
	if err := c.Go("b"); err != nil {
		t.Fatal(err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
	do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: 4096}, 0)
	if p.ever != 4 {
		t.Errorf("devices were opened %d times, want a, b, a, b", p.ever)
	}

	// Each connection has its own device, until its end.
	second := s.open(simple, "b")
	if n := p.count("b", 0); n != 2 {
		t.Errorf("two connections have %d devices", n)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	wait(t, ended, "the end of the second connection")
	if n := p.count("b", 0); n != 1 {
		t.Errorf("after one has left, %d devices are open", n)
	}
	// One that comes later is there; one that is gone stays for those who have it.
	p.mu.Lock()
	p.names = []string{"c"}
	p.mu.Unlock()
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)
	third := s.dial()
	if err := third.Info("b"); err == nil {
		t.Error("an export that is offered no more can be had")
	}
	if err := third.ExportName("c"); err != nil {
		t.Fatal(err)
	}
	do(t, third, nbdtest.Request{Cmd: nbdtest.Read, Length: 4096}, 0)

	// One that cannot be opened does not exist for the client, and the administrator learns why.
	p.mu.Lock()
	p.names, p.fail = []string{"d"}, errors.New("the disk is on fire")
	p.mu.Unlock()
	if err := s.dial().Go("d"); err == nil {
		t.Error("a device that cannot be opened is served")
	}
	s.stop()
	if len(failed) != 1 || failed[0] != "d: the disk is on fire" {
		t.Errorf("the observer learned %q", failed)
	}
	for name, n := range p.open {
		if n != 0 {
			t.Errorf("%d devices of %q are open after the server's end", n, name)
		}
	}
}

// TestProviderHides: what a client may not use is neither listed nor opened, nor is it reached under the name of an export
// that is kept from it.
func TestProviderHides(t *testing.T) {
	never := func(nbd.Peer) bool { return false }
	p := &shelf{names: []string{"secret"}, open: make(map[string]int), allow: never}
	s := start(t, nbd.Options{Provider: p})
	c := s.dial()
	if got := listNames(t, c); len(got) != 0 {
		t.Errorf("the list is %q", got)
	}
	if err := c.Info("secret"); err == nil {
		t.Error("a hidden export can be had")
	}
	q := &shelf{names: []string{"live"}, open: make(map[string]int)}
	s = start(t, nbd.Options{Provider: q}, nbd.Export{Name: "live", Device: nbdtest.NewDevice(4096), Allow: never})
	c = s.dial()
	if got := listNames(t, c); len(got) != 0 {
		t.Errorf("the list is %q", got)
	}
	if err := c.Info("live"); err == nil {
		t.Error("an offer stands in for a hidden export")
	}
	if p.ever+q.ever != 0 {
		t.Error("devices were opened for a client that may not use them")
	}
}

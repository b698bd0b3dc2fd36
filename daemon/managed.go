package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/storage"
)

var _ Managed = (*Daemon)(nil)

// Seal has exports that the control API wants added refused, for a reason.
func (d *Daemon) Seal(reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sealed = reason
}

// status implements Managed.
func (d *Daemon) status(s *ServerStatus) {
	s.Kind = "serve"
	s.Disks, s.Clients = len(d.all()), len(d.server.Clients())
	s.CacheBytes, s.CacheLimit = d.memory.Used(), d.limit
	s.URIs = d.URIs("")
}

// resizeNote is what a client has to do to see a disk's new size: the protocol does not tell it.
const resizeNote = "clients see the new size when they connect again"

// disks implements Managed.
func (d *Daemon) disks() []*disk {
	exports := d.all()
	clients := d.clientsOf(exports)
	list := make([]*disk, len(exports))
	for i, e := range exports {
		x := &disk{
			name: e.Name, dev: e.dev, served: e.disk, uris: d.URIs(e.Name), description: e.Description, bitmaps: e.Bitmaps,
			clients: clients[e], note: resizeNote,
		}
		if e.Image != e.Name {
			x.others = append(x.others, e.Image)
		}
		x.status = DiskStatus{
			Name: e.Name, Image: e.Image, ReadOnly: e.readOnly(), Clients: len(clients[e]), IO: ioStats(d.server.ExportStats(e.Name)),
		}
		if e.Snapshot != nil {
			x.status.Snapshot = e.Snapshot.String()
		}
		for _, c := range clients[e] {
			x.status.IO.Inflight += c.IO.Inflight
		}
		x.apply = func(ctx context.Context, fn func() error) error { return d.alone(ctx, e, fn) }
		list[i] = x
	}
	return list
}

func ioStats(s nbd.Stats) IOStats {
	return IOStats{
		Requests: s.Requests, Reads: s.Reads, Writes: s.Writes, Flushes: s.Flushes, Discards: s.Trims + s.Zeroes,
		BytesRead: s.BytesRead, BytesWritten: s.BytesWritten, Errors: s.Errors,
	}
}

// clientsOf lists the connections by the export that they use, itself or a snapshot of its image.
func (d *Daemon) clientsOf(exports []*openExport) map[*openExport][]ClientStatus {
	out := make(map[*openExport][]ClientStatus)
	for _, c := range d.server.Clients() {
		e := exportOf(exports, c.Export)
		if e == nil {
			continue // it is just being removed
		}
		io := ioStats(c.Stats)
		io.Inflight = c.Inflight
		out[e] = append(out[e], ClientStatus{
			ID: c.ID, Peer: c.Peer.String(), Since: c.Since.UTC(), Export: c.Conn.Export, Size: c.Size, IO: io,
		})
	}
	return out
}

// exportOf finds the export that a client's choice belongs to: that of the name, or the one with the longest name that has a
// snapshot so called.
func exportOf(exports []*openExport, name string) *openExport {
	var best *openExport
	for _, e := range exports {
		if e.Name == name {
			return e
		}
		if strings.HasPrefix(name, e.Name+"@") && (best == nil || len(e.Name) > len(best.Name)) {
			best = e
		}
	}
	return best
}

// inUse refuses while clients use an export or a snapshot of its image.
func (d *Daemon) inUse(e *openExport) error {
	clients := d.clientsOf(d.all())[e]
	if len(clients) == 0 {
		return nil
	}
	return conflictf("%q is in use by %d connections, the first of %s: disconnect them first", e.Name, len(clients), clients[0].Peer)
}

// reserve keeps others from adding or removing an export of a name meanwhile.
func (d *Daemon) reserve(name string) (release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.adding[name] {
		return nil, conflictf("export %q is just being added or removed", name)
	}
	d.adding[name] = true
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.adding, name)
	}, nil
}

// alone runs fn while an export that has no clients is not there for new ones either.
func (d *Daemon) alone(ctx context.Context, e *openExport, fn func() error) error {
	release, err := d.reserve(e.Name)
	if err != nil {
		return err
	}
	defer release()
	if err := d.inUse(e); err != nil {
		return err
	}
	if err := d.withdraw(ctx, e); err != nil {
		return err
	}
	return errors.Join(fn(), d.offer(e))
}

// withdraw takes an export away from its clients.
func (d *Daemon) withdraw(ctx context.Context, e *openExport) error {
	ctx, cancel := context.WithTimeout(ctx, d.drain)
	defer cancel()
	if err := d.server.RemoveExport(ctx, e.Name); err != nil {
		return fmt.Errorf("waiting for clients of %q to finish: %w", e.Name, err)
	}
	return nil
}

// addExport implements Managed.
func (d *Daemon) addExport(ctx context.Context, r ExportRequest) error {
	d.mu.Lock()
	sealed := d.sealed
	d.mu.Unlock()
	if sealed != "" {
		return conflictf("exports cannot be added: %s", sealed)
	}
	e, err := d.exportFor(r)
	if err != nil {
		return err
	}
	release, err := d.reserve(e.Name)
	if err != nil {
		return err
	}
	defer release()
	for _, have := range d.all() {
		if have.Name == e.Name {
			return conflictf("there is an export %q already, of %q", e.Name, have.Image)
		}
	}
	x, err := d.open(ctx, e)
	if err != nil {
		return d.refusedImage(e.Image, err)
	}
	if err := d.offer(x); err != nil {
		return errors.Join(err, x.close())
	}
	d.mu.Lock()
	d.exports = append(d.exports, x)
	d.mu.Unlock()
	return nil
}

// refusedImage gives an image that cannot be opened the status of a request that cannot be met. Who keeps it locked may be
// this very process.
func (d *Daemon) refusedImage(name string, err error) error {
	var opening *block.OpenError
	var lock *storage.LockError
	if st, serr := os.Stat(name); serr == nil && errors.As(err, &lock) {
		for _, e := range d.all() {
			if have, herr := os.Stat(e.Image); herr == nil && os.SameFile(st, have) {
				return conflictf("%q is being served already, as export %q: one image is served once", name, e.Name)
			}
		}
	}
	if errors.As(err, &opening) || errors.Is(err, ErrGuessedRaw) {
		return &statusError{http.StatusConflict, err}
	}
	return err
}

// exportFor makes an export of what is asked for and of what all exports have in common.
func (d *Daemon) exportFor(r ExportRequest) (Export, error) {
	e := d.template
	e.Name, e.Description, e.Image, e.Bitmaps = r.Name, r.Description, r.Image, r.Bitmaps
	switch {
	case !validName(r.Name) || !validName(r.Description):
		return e, invalidf("the name and the description of an export are UTF-8 of at most %d bytes", maxName)
	case r.Image == "":
		return e, invalidf("the request names no image")
	}
	if _, path, plain := block.SplitProtocol(r.Image); plain && !filepath.IsAbs(path) {
		return e, invalidf("%q is not an absolute path, and the server does not know to which folder it is relative", r.Image)
	}
	if r.Format != "" {
		e.Open.Format = r.Format
	}
	e.Open.ReadOnly = e.Open.ReadOnly || r.ReadOnly
	e.HideSnapshots = e.HideSnapshots || r.HideSnapshots
	if len(r.Options) > 0 {
		options := maps.Clone(e.Open.Options)
		if options == nil {
			options = make(map[string]string)
		}
		maps.Copy(options, r.Options)
		e.Open.Options = options
	}
	if r.Snapshot != "" {
		ref, err := image.ParseSnapshotRef(r.Snapshot)
		if err != nil {
			return e, invalidf("%w", err)
		}
		e.Snapshot, e.Open.ReadOnly = &ref, true
	}
	if len(r.Allow) > 0 {
		var rules Rules
		for _, text := range r.Allow {
			rule, err := ParseRule(text)
			if err != nil {
				return e, invalidf("%w", err)
			}
			rules = append(rules, rule)
		}
		e.Allow = rules.Allow
	}
	return e, nil
}

// removeExport implements Managed.
func (d *Daemon) removeExport(ctx context.Context, name string, force bool) error {
	all := d.all()
	i := slices.IndexFunc(all, func(e *openExport) bool { return e.Name == name })
	if i < 0 {
		return refusef(http.StatusNotFound, "there is no export %q", name)
	}
	e := all[i]
	release, err := d.reserve(name)
	if err != nil {
		return err
	}
	defer release()
	if !force {
		if err := d.inUse(e); err != nil {
			return fmt.Errorf("%w, or use --force", err)
		}
	}
	err = d.withdraw(ctx, e)
	// Nobody finds its snapshots any more from here on.
	d.mu.Lock()
	d.exports = slices.DeleteFunc(d.exports, func(x *openExport) bool { return x == e })
	d.mu.Unlock()
	d.server.Disconnect(func(c nbd.Conn) bool { return exportOf(all, c.Export) == e })
	if cerr := e.close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("closing %q: %w", e.Image, cerr))
	}
	return err
}

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Managed is a server whose disks a Control manages.
type Managed interface {
	// status fills in what the server itself knows.
	status(*ServerStatus)
	// disks lists what is served now.
	disks() []*disk
	// addExport and removeExport may say that disks come and go by other ways.
	addExport(context.Context, ExportRequest) error
	removeExport(ctx context.Context, name string, force bool) error
}

// ControlConfig says how a server is managed.
type ControlConfig struct {
	// Socket is where the API is served, nowhere if it has no path. Whatever its mode, only root and the user of this process
	// are listened to.
	Socket Address
	// Metrics is HOST[:PORT], where nothing but /metrics is served, to everybody; "": nowhere. Without a host it is the
	// loopback interface.
	Metrics string
	// Level is how much is logged, nil if that cannot be changed.
	Level *slog.LevelVar
	// Reload reads again what can change while the server runs, and says what did; nil: nothing.
	Reload  func() ([]string, error)
	Version string
	Log     *slog.Logger
}

// Control is the management API of a server: HTTP with JSON over a unix socket.
type Control struct {
	c         ControlConfig
	listeners []net.Listener
	servers   []*http.Server // one for each of them
	started   time.Time
	closing   sync.Once

	mu   sync.Mutex
	m    Managed // nil until Serve
	busy map[string]string
}

// limits of the API.
const (
	maxControlBody   = 64 << 10
	controlHeader    = 10 * time.Second // for a request to come
	controlShutdown  = 30 * time.Second // for requests to end
	maxControlHeader = 16 << 10
)

// OpenControl opens the sockets. Requests are answered from Serve on.
func OpenControl(ctx context.Context, c ControlConfig) (*Control, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	k := &Control{c: c, started: time.Now(), busy: make(map[string]string)}
	if c.Socket.Socket != "" {
		if !knowsPeers {
			return nil, errNoPeers
		}
		l, err := Listen(ctx, c.Socket)
		if err != nil {
			return nil, fmt.Errorf("control API: %w", err)
		}
		k.listeners = append(k.listeners, l)
		k.servers = append(k.servers, &http.Server{
			Handler: k.handler(), ConnContext: notePeer, ReadHeaderTimeout: controlHeader, MaxHeaderBytes: maxControlHeader,
			ErrorLog: k.errorLog(),
		})
	}
	if c.Metrics != "" {
		l, err := listenMetrics(ctx, c.Metrics)
		if err != nil {
			return nil, errors.Join(err, k.Close())
		}
		k.listeners = append(k.listeners, l)
		k.servers = append(k.servers, k.metricsServer())
	}
	return k, nil
}

func (k *Control) errorLog() *log.Logger {
	return slog.NewLogLogger(k.c.Log.Handler(), slog.LevelDebug)
}

// Folders are those of the unix sockets that go when the server does.
func (k *Control) Folders() []string { return socketFolders(k.listeners) }

// MetricsAddr is where the metrics are served, nil if nowhere but on the control socket.
func (k *Control) MetricsAddr() net.Addr {
	for _, l := range k.listeners {
		if l.Addr().Network() != "unix" {
			return l.Addr()
		}
	}
	return nil
}

// Serve answers requests about m until Close.
func (k *Control) Serve(m Managed) error {
	k.mu.Lock()
	k.m = m
	k.mu.Unlock()
	errs := make([]error, len(k.servers))
	var running sync.WaitGroup
	for i, s := range k.servers {
		running.Go(func() {
			if err := s.Serve(k.listeners[i]); !errors.Is(err, http.ErrServerClosed) {
				errs[i] = fmt.Errorf("control API at %v: %w", k.listeners[i].Addr(), err)
			}
		})
	}
	running.Wait()
	return errors.Join(errs...)
}

// Close waits for requests that have begun, for a while, and ends the API. It may be called again.
func (k *Control) Close() error {
	var errs []error
	k.closing.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), controlShutdown)
		defer cancel()
		for i, s := range k.servers {
			if err := s.Shutdown(ctx); err != nil {
				errs = append(errs, fmt.Errorf("control API: waiting for requests: %w", err), s.Close())
			}
			if err := k.listeners[i].Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	})
	return errors.Join(errs...)
}

// peerKey is where a request's context has who sent it.
type peerKey struct{}

// peer is who is at the other end of a connection.
type peer struct {
	uid uint32
	err error
}

func notePeer(ctx context.Context, c net.Conn) context.Context {
	uid, err := peerUser(c)
	return context.WithValue(ctx, peerKey{}, peer{uid, err})
}

// allowed refuses everybody but root and the user of this process.
func allowed(ctx context.Context) error {
	p, ok := ctx.Value(peerKey{}).(peer)
	switch {
	case !ok:
		return refusef(http.StatusForbidden, "nobody knows who is asking")
	case p.err != nil:
		return refusef(http.StatusForbidden, "finding out who is asking: %w", p.err)
	case p.uid != 0 && p.uid != uint32(os.Geteuid()):
		return refusef(http.StatusForbidden, "user %d may not manage this server: only root and user %d may", p.uid, os.Geteuid())
	}
	return nil
}

// handler routes requests. Names are in the query: they may be empty, and may have slashes in them.
func (k *Control) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, h := range map[string]func(*http.Request) (any, error){
		"GET /v1/server":                k.serverStatus,
		"GET /v1/disks":                 k.listDisks,
		"GET /v1/disk":                  k.showDisk,
		"POST /v1/disk/flush":           k.onDisk("flush", flushDisk),
		"POST /v1/disk/check":           k.onDisk("check", checkDisk),
		"POST /v1/disk/resize":          k.onDisk("resize", resizeDisk),
		"POST /v1/disk/compact":         k.onDisk("compact", compactDisk),
		"GET /v1/disk/snapshots":        k.onDisk("", listSnapshots),
		"POST /v1/disk/snapshots":       k.onDisk("snapshot create", createSnapshot),
		"PATCH /v1/disk/snapshots":      k.onDisk("snapshot rename", renameSnapshot),
		"DELETE /v1/disk/snapshots":     k.onDisk("snapshot delete", deleteSnapshot),
		"POST /v1/disk/snapshots/apply": k.onDisk("snapshot apply", applySnapshot),
		"GET /v1/disk/bitmaps":          k.onDisk("", listBitmaps),
		"POST /v1/disk/bitmaps":         k.onDisk("bitmap add", addBitmap),
		"PATCH /v1/disk/bitmaps":        k.onDisk("bitmap change", changeBitmap),
		"DELETE /v1/disk/bitmaps":       k.onDisk("bitmap remove", removeBitmap),
		"POST /v1/exports":              k.addExport,
		"DELETE /v1/exports":            k.removeExport,
		"POST /v1/reload":               k.reload,
		"GET /v1/log-level":             k.logLevel,
		"PUT /v1/log-level":             k.setLogLevel,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { k.answer(w, r, h) })
	}
	mux.Handle("GET /metrics", metricsHandler(k.look))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := allowed(r.Context()); err != nil {
			k.c.Log.Warn("control API: refused", "error", err)
			writeError(w, err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// answer runs one request. What changes something is logged.
func (k *Control) answer(w http.ResponseWriter, r *http.Request, h func(*http.Request) (any, error)) {
	r.Body = http.MaxBytesReader(w, r.Body, maxControlBody)
	began := time.Now()
	out, err := h(r)
	level := slog.LevelDebug
	if r.Method != http.MethodGet {
		level = slog.LevelInfo
	}
	who, _ := r.Context().Value(peerKey{}).(peer)
	attrs := []any{"request", r.Method + " " + r.URL.Path, "query", r.URL.RawQuery, "uid", who.uid,
		"time", time.Since(began).Round(time.Microsecond)}
	if err != nil {
		k.c.Log.Log(r.Context(), level, "control", append(attrs, "error", err)...)
		writeError(w, err)
		return
	}
	k.c.Log.Log(r.Context(), level, "control", attrs...)
	if out == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	writeJSON(w, http.StatusOK, out)
}

func writeError(w http.ResponseWriter, err error) {
	writeJSON(w, statusOf(err), ErrorReply{err.Error()})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // who went away does not want to know
}

// body decodes what a request brings. What is misspelled is refused rather than left out.
func body(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return invalidf("reading the request: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return invalidf("reading the request: there is more than one JSON value in it")
	}
	return nil
}

func (k *Control) managed() Managed {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.m
}

func (k *Control) serverNow() ServerStatus {
	s := ServerStatus{Version: k.c.Version, PID: os.Getpid(), Started: k.started.UTC().Truncate(time.Second)}
	if k.c.Level != nil {
		s.LogLevel = strings.ToLower(k.c.Level.Level().String())
	}
	if m := k.managed(); m != nil {
		m.status(&s)
	}
	return s
}

func (k *Control) serverStatus(*http.Request) (any, error) { return k.serverNow(), nil }

// operation returns what somebody does to a disk as a whole, "" if nobody does anything.
func (k *Control) operation(d *disk) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.busy[d.key()]
}

// begin registers an operation on a disk, one at a time: the second would only wait for the first, and nobody would see why.
func (k *Control) begin(d *disk, what string) (end func(), err error) {
	if d.dev == nil || what == "" {
		return func() {}, nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if other := k.busy[d.key()]; other != "" {
		return nil, conflictf("%q is busy with %q: try again when that is done", d.name, other)
	}
	k.busy[d.key()] = what
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.busy, d.key())
	}, nil
}

func (k *Control) list() []DiskStatus {
	m := k.managed()
	if m == nil {
		return []DiskStatus{}
	}
	out := []DiskStatus{}
	for _, d := range m.disks() {
		d.fill(k.operation(d))
		out = append(out, d.status)
	}
	return out
}

func (k *Control) listDisks(*http.Request) (any, error) { return k.list(), nil }

// find returns the disk that a request is about. Only one can be meant.
func (k *Control) find(r *http.Request) (*disk, error) {
	m := k.managed()
	if m == nil {
		return nil, refusef(http.StatusServiceUnavailable, "the server is still starting")
	}
	q := r.URL.Query()
	if !q.Has("name") {
		return nil, invalidf("the request names no disk (?name=)")
	}
	name := q.Get("name")
	all := m.disks()
	var found []*disk
	for _, d := range all {
		if d.name == name || slices.Contains(d.others, name) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 0:
		return nil, refusef(http.StatusNotFound, "there is no disk %q ('drover ctl list' shows those there are)", name)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, d := range found {
		names = append(names, d.others...)
	}
	return nil, conflictf("%q may be any of %d disks: say which by one of %q", name, len(found), names)
}

func (k *Control) showDisk(r *http.Request) (any, error) {
	d, err := k.find(r)
	if err != nil {
		return nil, err
	}
	return d.details(k.operation(d))
}

// onDisk makes a handler of what is done to one disk. It is finished even if whoever asked for it goes: half-done is worse.
func (k *Control) onDisk(what string, do func(context.Context, *disk, *http.Request) (any, error)) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		d, err := k.find(r)
		if err != nil {
			return nil, err
		}
		end, err := k.begin(d, what)
		if err != nil {
			return nil, err
		}
		defer end()
		return do(context.WithoutCancel(r.Context()), d, r)
	}
}

func flushDisk(ctx context.Context, d *disk, _ *http.Request) (any, error) { return nil, d.flush(ctx) }

func checkDisk(ctx context.Context, d *disk, _ *http.Request) (any, error) { return d.check(ctx) }

func resizeDisk(ctx context.Context, d *disk, r *http.Request) (any, error) {
	var req ResizeRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return d.changeSize(ctx, req)
}

func listSnapshots(_ context.Context, d *disk, _ *http.Request) (any, error) { return d.snapshotList() }

func createSnapshot(ctx context.Context, d *disk, r *http.Request) (any, error) {
	var req NameRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return d.createSnapshot(ctx, req)
}

// argument is a part of the query that a request needs.
func argument(r *http.Request, name string) (string, error) {
	v := r.URL.Query().Get(name)
	if v == "" {
		return "", invalidf("the request does not say which %s (?%s=)", name, name)
	}
	return v, nil
}

func renameSnapshot(ctx context.Context, d *disk, r *http.Request) (any, error) {
	name, err := argument(r, "snapshot")
	if err != nil {
		return nil, err
	}
	var req NameRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return nil, d.renameSnapshot(ctx, name, req)
}

func deleteSnapshot(ctx context.Context, d *disk, r *http.Request) (any, error) {
	name, err := argument(r, "snapshot")
	if err != nil {
		return nil, err
	}
	return nil, d.deleteSnapshot(ctx, name)
}

func applySnapshot(ctx context.Context, d *disk, r *http.Request) (any, error) {
	name, err := argument(r, "snapshot")
	if err != nil {
		return nil, err
	}
	return nil, d.applySnapshot(ctx, name)
}

func listBitmaps(_ context.Context, d *disk, _ *http.Request) (any, error) { return d.bitmapList() }

func addBitmap(ctx context.Context, d *disk, r *http.Request) (any, error) {
	var req BitmapRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return nil, d.addBitmap(ctx, req)
}

func changeBitmap(ctx context.Context, d *disk, r *http.Request) (any, error) {
	name, err := argument(r, "bitmap")
	if err != nil {
		return nil, err
	}
	var req BitmapAction
	if err := body(r, &req); err != nil {
		return nil, err
	}
	return nil, d.changeBitmap(ctx, name, req)
}

func removeBitmap(ctx context.Context, d *disk, r *http.Request) (any, error) {
	name, err := argument(r, "bitmap")
	if err != nil {
		return nil, err
	}
	return nil, d.removeBitmap(ctx, name)
}

func (k *Control) addExport(r *http.Request) (any, error) {
	var req ExportRequest
	if err := body(r, &req); err != nil {
		return nil, err
	}
	m := k.managed()
	if m == nil {
		return nil, refusef(http.StatusServiceUnavailable, "the server is still starting")
	}
	return nil, m.addExport(context.WithoutCancel(r.Context()), req)
}

func (k *Control) removeExport(r *http.Request) (any, error) {
	d, err := k.find(r)
	if err != nil {
		return nil, err
	}
	end, err := k.begin(d, "export remove")
	if err != nil {
		return nil, err
	}
	defer end()
	force := r.URL.Query().Get("force") == "true"
	return nil, k.managed().removeExport(context.WithoutCancel(r.Context()), d.name, force)
}

func (k *Control) reload(*http.Request) (any, error) {
	if k.c.Reload == nil {
		return ReloadReply{Changes: []string{}}, nil
	}
	changes, err := k.c.Reload()
	if err != nil {
		return nil, &statusError{http.StatusConflict, err}
	}
	if changes == nil {
		changes = []string{}
	}
	return ReloadReply{Changes: changes}, nil
}

var errNoLevel = &statusError{http.StatusBadRequest, errors.New("this server's log level cannot be changed")}

func (k *Control) logLevel(*http.Request) (any, error) {
	if k.c.Level == nil {
		return nil, errNoLevel
	}
	return LogLevel{Level: strings.ToLower(k.c.Level.Level().String())}, nil
}

func (k *Control) setLogLevel(r *http.Request) (any, error) {
	var req LogLevel
	if err := body(r, &req); err != nil {
		return nil, err
	}
	level, err := ParseLogLevel(req.Level)
	if err != nil {
		return nil, invalidf("%w", err)
	}
	if k.c.Level == nil {
		return nil, errNoLevel
	}
	k.c.Level.Set(level)
	return LogLevel{Level: strings.ToLower(level.String())}, nil
}

// ParseLogLevel reads the name of a level.
func ParseLogLevel(name string) (slog.Level, error) {
	switch strings.ToLower(name) {
	case "error":
		return slog.LevelError, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "info":
		return slog.LevelInfo, nil
	case "debug":
		return slog.LevelDebug, nil
	}
	return 0, fmt.Errorf("%q is no log level: expecting error, warn, info or debug", name)
}

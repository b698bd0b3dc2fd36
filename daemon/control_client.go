package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
)

// ControlClient talks to the control API of a server.
type ControlClient struct {
	path string
	http http.Client
}

// NewControlClient makes a client of the API at a unix socket. It connects when it is used.
func NewControlClient(path string) *ControlClient {
	return &ControlClient{path: path, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

// Close ends the connection.
func (c *ControlClient) Close() { c.http.CloseIdleConnections() }

// ControlError is an answer of the API that says no.
type ControlError struct {
	Status  int
	Message string
}

// Error implements error.
func (e *ControlError) Error() string { return e.Message }

// maxControlReply bounds what is taken of an answer: thousands of disks with thousands of snapshots.
const maxControlReply = 256 << 20

// Call sends a request with in as its body, if it is not nil, and decodes the answer into out, if that is not nil.
func (c *ControlClient) Call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "drover", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.failed(err)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxControlReply))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return fmt.Errorf("control socket %q: reading the answer: %w", c.path, err)
	}
	if resp.StatusCode >= 300 {
		e := ControlError{Status: resp.StatusCode, Message: resp.Status}
		var reply ErrorReply
		if json.Unmarshal(b, &reply) == nil && reply.Error != "" {
			e.Message = reply.Error
		}
		return &e
	}
	if out == nil || len(b) == 0 {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("control socket %q: the answer is not that of this version's API: %w", c.path, err)
	}
	return nil
}

// failed says what to do about a server that does not answer.
func (c *ControlClient) failed(err error) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("control socket %q: "+format, append([]any{c.path}, args...)...)
	}
	var errno syscall.Errno
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fail("there is none: is the server running, and with --control? (--socket names another)")
	case errors.Is(err, os.ErrPermission):
		return fail("permission denied: only root and the user of the server may manage it")
	case refused(err):
		return fail("nobody listens on it: the server has ended")
	case errors.As(err, &errno):
		return fail("%w", errno)
	}
	return fail("%s", strings.TrimPrefix(err.Error(), "Get "))
}

package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// setting is one line of a configuration file: a flag and its value.
type setting struct {
	name, value string
	line        int
}

// configFile is a file that says what flags say, a line for each: NAME = VALUE, without the dashes. Those on the command line
// come first; a flag that may be repeated is either there or here.
type configFile struct {
	path    string
	may     bool // the file may be missing
	applied []setting
}

// maxConfigFile bounds what is read of one.
const maxConfigFile = 1 << 20

func (c *configFile) read() ([]setting, error) {
	b, err := os.ReadFile(c.path)
	if c.may && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) > maxConfigFile {
		return nil, fmt.Errorf("%s: a configuration has at most %d bytes", c.path, maxConfigFile)
	}
	var list []setting
	lines := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(text, "=")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return nil, fmt.Errorf("%s:%d: expecting NAME = VALUE", c.path, n)
		}
		list = append(list, setting{name, strings.TrimSpace(value), n})
	}
	return list, lines.Err()
}

// apply gives flags that were not on the command line the values of the file.
func (c *configFile) apply(f *pflag.FlagSet) error {
	if c.path == "" {
		return nil
	}
	list, err := c.read()
	if err != nil {
		return usagef("--config: %v", err)
	}
	given := make(map[string]bool)
	f.Visit(func(flag *pflag.Flag) { given[flag.Name] = true })
	for _, s := range list {
		if s.name == "config" || f.Lookup(s.name) == nil {
			return usagef("--config: %s:%d: there is no flag --%s", c.path, s.line, s.name)
		}
		if given[s.name] {
			continue
		}
		if err := f.Set(s.name, s.value); err != nil {
			return usagef("--config: %s:%d: %v", c.path, s.line, err)
		}
		c.applied = append(c.applied, s)
	}
	return nil
}

// reload reads the file again and returns the settings whose values have changed, by name. Those on the command line of f
// are none.
func (c *configFile) reload(f *pflag.FlagSet) (map[string][]string, error) {
	if c.path == "" {
		return nil, nil
	}
	list, err := c.read()
	if err != nil {
		return nil, err
	}
	for _, s := range list {
		if s.name == "config" || f.Lookup(s.name) == nil {
			return nil, fmt.Errorf("%s:%d: there is no flag --%s", c.path, s.line, s.name)
		}
	}
	fromFile := values(c.applied)
	now := values(list)
	changed := make(map[string][]string)
	for name, v := range now {
		if f.Changed(name) && fromFile[name] == nil {
			continue // the command line has it
		}
		if !slices.Equal(v, fromFile[name]) {
			changed[name] = v
		}
	}
	for name := range fromFile {
		if now[name] == nil {
			changed[name] = nil
		}
	}
	c.applied = slices.DeleteFunc(list, func(s setting) bool { return f.Changed(s.name) && fromFile[s.name] == nil })
	return changed, nil
}

// values lists the values of each name, in order.
func values(list []setting) map[string][]string {
	out := make(map[string][]string)
	for _, s := range list {
		out[s.name] = append(out[s.name], s.value)
	}
	return out
}

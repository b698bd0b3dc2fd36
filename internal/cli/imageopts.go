package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/droverproject/drover/block"
)

// encryptOptionNames are the options of an encrypted image, after "encrypt.".
var encryptOptionNames = []string{"format", "key-secret"}

// encryptOption checks an option that has to do with encryption, of the image or of one below it.
func (s *source) encryptOption(key, value string) error {
	for strings.HasPrefix(key, "backing.") {
		key = strings.TrimPrefix(key, "backing.")
	}
	name, ok := strings.CutPrefix(key, "encrypt.")
	if !ok {
		return nil
	}
	if !slices.Contains(encryptOptionNames, name) {
		return fmt.Errorf("Parameter '%s' is unexpected", name)
	}
	if name == "key-secret" {
		_, err := s.secrets.lookup(value)
		return err
	}
	return nil
}

// parseImageOpts understands the options that describe a format over a file. Others are refused rather than ignored.
func (s *source) parseImageOpts(arg string) error {
	s.name = ""
	s.options = make(map[string]string)
	for i, part := range splitOptions(arg) {
		key, value, ok := strings.Cut(part, "=")
		if !ok && i == 0 {
			key, value = "file", part
		}
		switch key {
		case "driver":
			s.format = value
		case "file", "file.filename", "filename":
			s.name = value
		case "file.driver":
			if value != "file" && value != "host_device" {
				return errorf("Could not open '%s': Unknown driver '%s'", arg, value)
			}
		case "force-share":
			s.forceShare = value == "on"
		case "read-only", "file.locking", "cache.direct", "cache.no-flush":
			// They choose how, not what: reading sees the same.
		default:
			if err := s.encryptOption(key, value); err != nil {
				return errorf("Could not open '%s': %w", arg, err)
			}
			s.options[key] = value
		}
	}
	if s.format == "file" {
		s.format = block.FormatRaw
	}
	if s.name == "" {
		return errorf("Could not open '%s': A block device must be specified for \"file\"", arg)
	}
	return nil
}

// splitOptions cuts "a=b,c=d" at its commas; a doubled comma stands for one.
func splitOptions(text string) []string {
	var parts []string
	var cur strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != ',' {
			cur.WriteByte(text[i])
			continue
		}
		if i+1 < len(text) && text[i+1] == ',' {
			cur.WriteByte(',')
			i++
			continue
		}
		parts = append(parts, cur.String())
		cur.Reset()
	}
	return append(parts, cur.String())
}
